"""Links and code of the documents, by a checker that is itself tried on what is broken."""

import re

import pytest

from pages.notebooks import NOTEBOOKS
from tests import documents
from tests.documents import DOCUMENTS
from tests.small import ROOT


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    assert documents.dead_links(path, path.read_text()) == []


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda p: p.name)
def test_code_could_be_run(path):
    broken = [documents.broken_code(*block) for block in documents.blocks(path.read_text())]
    assert [why for why in broken if why] == []


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda p: p.name)
def test_commands_name_scripts_options_and_targets_that_there_are(path):
    found = [fault for c in documents.commands(path.read_text()) for fault in documents.faults(c)]
    assert found == []


def test_there_is_something_to_check():
    texts = [path.read_text() for path in DOCUMENTS]
    assert sum(len(documents.blocks(text)) for text in texts) > 30
    scripts = [documents.named_script(c.split()) for t in texts for c in documents.commands(t)]
    assert len([s for s in scripts if s]) > 60 and len({s for s in scripts if s}) > 20
    assert len(documents.options(ROOT / 'tools/export_onnx.py')) > 10
    assert '--compile' in documents.options(ROOT / 'tools/lint_onnx.py')


@pytest.mark.parametrize(
    'link', ['nowhere.md', 'docs/qat.md#no-such-heading', '#nor-this', 'docs/none.png']
)
def test_a_dead_link_is_found(link):
    text = f'# A heading\n\n[there]({link}) ![here]({link})\n'
    assert documents.dead_links(ROOT / 'README.md', text) == [link, link]
    text = '# A heading\n\n[a](docs/lint.md#q01) [b](#a-heading) [c](https://x.org/#y) `[d](e)`\n'
    assert documents.dead_links(ROOT / 'README.md', text.replace('`[d](e)`', '')) == []


@pytest.mark.parametrize(
    'command',
    [
        'python tools/calibrat.py CONFIG',
        'python tools/calibrate.py CONFIG float.pth --out x --number 3',
        'OMP_NUM_THREADS=1 mmdet3d-quant export-onnx x y --out=z --no-such',
        'mmdet3d-quant nothing',
        'make tests',
        'torchrun --nproc-per-node 8 tools/trian.py CONFIG',
        '.venv/bin/python -m pages.nothing',
    ],
)
def test_a_command_that_fails_is_found(command):
    assert documents.faults(command)
    assert documents.commands(f'```bash\n{command}\n```\n') == [command]
    assert documents.commands(f'```console\n$ {command}\nmake nothing\n```\n') == [command]


@pytest.mark.parametrize(
    'language, code', [('python', 'a = (1'), ('python', 'return 1'), ('bash', 'for x in y; do z')]
)
def test_code_that_cannot_run_is_found(language, code):
    assert documents.broken_code(language, code)


def test_every_document_has_its_place_on_the_site():
    """As mkdocs.yml has it; without MkDocs, which only `make docs` installs."""
    text = (ROOT / 'mkdocs.yml').read_text()
    named = set(re.findall(r'^ +- (?:.+: )?([\w/-]+\.md)$', text.partition('\nnav:')[2], re.M))
    added = {f'notebooks/{path.stem}.md' for path in NOTEBOOKS}
    added |= {'overview.md', 'contributing.md', 'changelog.md', 'weights.md', 'reference/index.md'}
    assert named == added | {path.name for path in (ROOT / 'docs').glob('*.md')}
