"""What the package imports is what setup.py asks for, and nothing comes by luck."""

import ast
import re
import sys

import pytest

from tests.matrix import requirements
from tests.small import ROOT

#: Names of packages whose module is called otherwise.
MODULES = {
    'pillow': 'PIL',
    'pytorch-quantization': 'pytorch_quantization',
    'nuscenes-devkit': 'nuscenes',
    'tensorrt-rtx-cu12-bindings': 'tensorrt_rtx_bindings',
}
#: What is there already (it fits the CUDA version), is a choice of the user, or is part of another.
NOT_DECLARED = {'torch', 'mmcv', 'spconv', 'tensorrt', 'nncf'}
PART_OF = {'cv2': 'mmcv', 'google': 'onnx', 'markupsafe': 'jinja2', 'triton': 'torch'}
#: Rooms that a user without the extra `export` never imports.
EXTRA = ('engines', 'export', 'check')
PACKAGE = ROOT / 'mmdet3d_quant'
TOOLS = {path.stem for path in (ROOT / 'tools').glob('*.py')}


def named(texts):
    words = [re.match(r'[\w-]+', text)[0].lower() for text in texts]
    return {MODULES.get(word, word) for word in words}


DECLARED = {extra: named(texts) for extra, texts in requirements().items()}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition('.')[0]


def undeclared(path):
    """What a file imports that nothing declares for its room."""
    known = DECLARED[''] | NOT_DECLARED | set(PART_OF) | DECLARED['safetensors']
    rooms = {'tools'} if path.parent == ROOT / 'tools' else set(path.relative_to(PACKAGE).parts)
    if rooms & {*EXTRA, 'tools'} or path == PACKAGE / 'files/typed.py':  # which they share
        known |= DECLARED['export'] | DECLARED['compiler']
    own = {'mmdet3d_quant', *TOOLS} | set(sys.stdlib_module_names)
    return sorted(set(imported(path)) - known - own)


FILES = sorted([*PACKAGE.rglob('*.py'), *(ROOT / 'tools').glob('*.py')])


@pytest.mark.skipif(sys.version_info < (3, 10), reason='no list of the standard library')
def test_every_import_is_declared():
    found = {str(path.relative_to(ROOT)): undeclared(path) for path in FILES}
    assert {name: missing for name, missing in found.items() if missing} == {}


def test_nothing_is_declared_in_vain():
    used = {name for path in FILES for name in imported(path)}
    declared = DECLARED[''] | DECLARED['export'] | DECLARED['safetensors']
    assert declared - used == set() and NOT_DECLARED <= used and set(PART_OF) <= used
    assert set(PART_OF.values()) <= declared | NOT_DECLARED


def test_the_lock_has_all_of_them():
    lock = named((ROOT / 'requirements/lock.txt').read_text().splitlines()[1:])
    assert DECLARED[''] | DECLARED['export'] | DECLARED['dev'] <= lock | {'ruff', 'mypy'}
