"""The package's imports go one way, and importing it does nothing but register."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mmdet3d_quant.compat import removesuffix

PACKAGE = Path(__file__).resolve().parents[1] / 'mmdet3d_quant'

FLOORS = {
    'compat': 0,
    'errors': 0,
    'naming': 0,
    'spec': 0,
    'version': 0,
    'fake_quant': 1,
    'quantizer': 1,
    'modes': 1,
    'amax': 1,
    'histogram': 1,
    'counting': 1,
    'checkpoint': 1,
    'files': 1,
    'optim': 1,
    'layers': 2,
    'ties': 2,
    'fold': 2,
    'parents': 2,
    'models': 3,
    'bevfusion': 3,
    'provenance': 3,
    'samples': 4,
    'synthetic': 4,
    'evaluation': 4,
    'calibration': 4,
    'qat': 4,
    'conversion': 4,
    'from_config': 4,
    'export': 4,
    'report': 4,
}
MODULES = sorted(PACKAGE.rglob('*.py'))
#: Rooms below the models know nothing of mmdet3d; float parents subclass it.
NO_MMDET3D = [n for n, floor in FLOORS.items() if floor <= 2 and n != 'parents']


def room(path):
    """The module or package directly below mmdet3d_quant."""
    return removesuffix(path.relative_to(PACKAGE).parts[0], '.py')


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            yield node.module
            if node.module == 'mmdet3d_quant':
                yield from (f'mmdet3d_quant.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    if path == PACKAGE / '__init__.py':
        return
    here = room(path)
    for name in imports(path):
        parts = name.split('.')
        if parts[0] == 'mmdet3d' and here in NO_MMDET3D:
            pytest.fail(f'{path.name} imports {name}: floor {FLOORS[here]} is free of mmdet3d')
        if parts[0] == 'onnx':
            assert here == 'export', f'{path} knows onnx'
        if parts[0] == 'mmdet3d_quant' and len(parts) > 1 and parts[1] != here:
            assert parts[1] in FLOORS, f'{path} imports the unknown room {parts[1]}'
            assert FLOORS[parts[1]] <= FLOORS[here], f'{path} imports {name}, a floor above'


def test_import_registers_quant_types_and_nothing_else():
    code = """
import warnings, logging
from mmdet3d.registry import MODELS, TASK_UTILS, TRANSFORMS
from mmengine.registry import MODELS as ROOT
import mmdet3d.models, mmdet.models, spconv.pytorch
registries = [MODELS, TASK_UTILS, TRANSFORMS, ROOT]
before = [set(r.module_dict) for r in registries]
filters = list(warnings.filters)
import mmdet3d_quant, torch
new = set().union(*(set(r.module_dict) - b for r, b in zip(registries, before)))
assert new and all(n.startswith('Quant') for n in new), new
assert 'mmdet3d_quant.bevfusion' not in __import__('sys').modules
assert not torch.cuda.is_initialized()
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
