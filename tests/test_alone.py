"""The project stands alone: nothing in it looks for a folder beside the checkout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.small import ROOT

FOLDERS = ('mmdet3d_quant', 'tools', 'tests', 'docs', 'benchmarks', 'configs', 'requirements')
FOLDERS += ('pages', 'docker', '.github')
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob('*')
    if path.suffix in ('.py', '.md', '.txt', '.html', '.toml', '.sh', '.yml', '.cpu', '.gpu')
)
FILES += [ROOT / name for name in ('README.md', 'CHANGELOG.md', 'Makefile', 'setup.py')]
FILES += [ROOT / 'pyproject.toml', ROOT / 'checkpoints/README.md']
#: A folder above the file's own, counted by `parents[N]`, or written as `../`.
CLIMBS = re.compile(r'__file__\)[.\w()]*\.parents\[(\d+)\]')
RELATIVE = re.compile(r'(?:\.\./)+[\w./-]*')
ABOVE = re.compile(r'\b(?:ROOT|CHECKOUT|REPO)\.parent\b|\.parents\[[3-9]\]')


def escapes(path: Path, text: str) -> list[str]:
    """What in a file leads out of the checkout."""
    depth = len(path.relative_to(ROOT).parts)
    found = [m[0] for m in CLIMBS.finditer(text) if int(m[1]) >= depth]
    found += [m[0] for m in ABOVE.finditer(text)]
    for m in RELATIVE.finditer(text):
        target = (path.parent / m[0]).resolve()
        inside = target == ROOT or ROOT in target.parents
        if not inside or not target.exists():  # from the root it would lead out
            found.append(m[0])
    return found


def test_there_is_something_to_look_through():
    assert len(FILES) > 250 and Path(__file__) in FILES


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_path_leads_out_of_the_checkout(path):
    if path != Path(__file__):
        assert escapes(path, path.read_text()) == []


@pytest.mark.parametrize(
    'line',
    [
        "FRAME = ROOT.parent / 'elsewhere'",
        'ROOT = Path(__file__).resolve().parents[2]',
        "path = Path(__file__).parent / '../../elsewhere/data'",
        'see [there](../../elsewhere/README.md)',
        'read in place from ../elsewhere/data',
    ],
)
def test_a_path_that_does_is_found(line):
    assert escapes(ROOT / 'tools/tool.py', line)


@pytest.mark.parametrize(
    'line', ['ROOT = Path(__file__).resolve().parents[1]', '[cfg](../configs/bevfusion)']
)
def test_a_path_inside_is_not(line):
    assert escapes(ROOT / 'tools/tool.py', line) == []
