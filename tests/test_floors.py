"""The package's imports go one way, and importing it does nothing but register."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmdet3d_quant.core.compat import removesuffix

PACKAGE = Path(__file__).resolve().parents[1] / 'mmdet3d_quant'

#: Rooms, from the ground up: a room knows only those on floors below its own.
FLOORS = {
    'core': 0,
    'version': 0,
    'moved': 0,
    'doctor': 1,
    'files': 1,
    'parents': 1,
    'data': 2,
    'layers': 2,
    'runs': 3,
    'models': 3,
    'bevfusion': 3,
    'synthetic': 3,
    'engines': 3,
    'calibration': 3,
    'export': 4,
    'improve': 4,
    'qat': 5,
    'check': 5,
    'report': 5,
    'sensitivity': 5,
    'jobs': 6,  # from files to files: what a tool does, with what all others offer
}
#: Rooms that know fewer others than their floor lets them.
ONLY = {
    'doctor': {'version'},  # speaks where nothing else can be imported
    'engines': {'core', 'files'},  # no torch model
    'models': {'core', 'layers', 'parents'},
    'export': {'core', 'files', 'layers', 'parents', 'version'},
}
#: Packages that few know.
KNOWN_TO = {
    'onnx': ('files/typed.py', 'engines', 'export', 'check'),
    'onnxruntime': ('engines/onnxruntime.py', 'export/passes.py'),  # its FP16 converter
    'openvino': ('engines/openvino',),
    'tensorrt': ('engines/tensorrt.py',),
    'tensorrt_rtx_bindings': ('engines/tensorrt_rtx',),
}
#: What breaks a rule above, and why.
EXCEPTIONS = {
    # A file for any batch size is tried with one and two samples before it is handed out.
    ('export/onnx.py', 'mmdet3d_quant.engines'),
    # What stays float32 in a file typed FP16 is found by running it.
    ('export/ranges.py', 'mmdet3d_quant.engines'),
}
MODULES = sorted(PACKAGE.rglob('*.py'))
#: Rooms below the models know nothing of mmdet3d; float parents and the metric do.
NO_MMDET3D = ('core', 'files', 'layers')


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


def broken(path, name):
    """The rule that an import breaks, or None."""
    here, at = room(path), path.relative_to(PACKAGE).as_posix()
    parts = name.split('.')
    if parts[0] == 'mmdet3d' and here in NO_MMDET3D:
        return f'{here} is free of mmdet3d'
    if parts[0] in KNOWN_TO and not at.startswith(KNOWN_TO[parts[0]]):
        return f'only {", ".join(KNOWN_TO[parts[0]])} know {parts[0]}'
    if parts[0] != 'mmdet3d_quant' or len(parts) == 1 or parts[1] == here:
        return None
    if parts[1] not in FLOORS:
        return f'the room {parts[1]} is unknown'
    if FLOORS[parts[1]] >= FLOORS[here]:
        return f'{parts[1]} is no floor below {here}'
    if here in ONLY and parts[1] not in ONLY[here]:
        return f'{here} knows only {", ".join(sorted(ONLY[here]))}'
    return None


def test_every_room_has_its_line():
    plan = (PACKAGE.parent / 'docs/design.md').read_text().partition('```')[2].partition('```')[0]
    rows = re.findall(r'^  (\w+)/ .*F(\d)$', plan, re.M)
    assert {room: int(floor) for room, floor in rows} == {
        room: floor for room, floor in FLOORS.items() if room not in ('version', 'moved')
    }


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    if path == PACKAGE / '__init__.py':
        return
    at = path.relative_to(PACKAGE).as_posix()
    for name in imports(path):
        excused = any(at == file and name.startswith(what) for file, what in EXCEPTIONS)
        assert excused or broken(path, name) is None, f'{path} imports {name}'


@pytest.mark.parametrize(
    'file, name',
    [
        ('core/spec.py', 'mmdet3d_quant.files'),
        ('engines/memory.py', 'mmdet3d_quant.layers'),
        ('export/suite.py', 'mmdet3d_quant.check.verify'),
        ('export/suite.py', 'mmdet3d_quant.engines'),
        ('models/resnet.py', 'mmdet3d_quant.bevfusion'),
        ('synthetic/world.py', 'mmdet3d_quant.runs'),
        ('layers/conv.py', 'mmdet3d.models'),
        ('report/page.py', 'onnx'),
        ('check/verify.py', 'openvino'),
        ('check/benchmark.py', 'mmdet3d_quant.report.page'),
        ('calibration/strata.py', 'mmdet3d_quant.jobs.calibration'),
        ('core/spec.py', 'mmdet3d_quant.nowhere'),
    ],
)
def test_an_import_that_breaks_a_rule_is_found(file, name):
    assert broken(PACKAGE / file, name)


def test_exceptions_are_needed():
    for file, what in EXCEPTIONS:
        path = PACKAGE / file
        assert any(n.startswith(what) and broken(path, n) for n in imports(path))


def test_the_root_holds_the_face_and_nothing_else():
    assert {p.name for p in PACKAGE.glob('*.py')} == {'__init__.py', 'version.py', 'moved.py'}


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


def test_no_test_module_imports_from_another():
    """What several want is in a module of its own, as small.py."""
    found = []
    for path in sorted((PACKAGE.parent / 'tests').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [getattr(node, 'module', None) or ''] if isinstance(node, ast.ImportFrom) else []
            )
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names += [alias.name for alias in node.names]
            found += [
                f'{path.name}: {n}' for n in names if n.rpartition('.')[2].startswith('test_')
            ]
    assert found == []


def subscripted(tree):
    """Names of the standard library's containers that code, not an annotation, subscripts."""
    generic = {'dict', 'list', 'tuple', 'set', 'frozenset', 'type'}
    spared = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ('collections.abc', 'contextlib'):
            generic |= {alias.asname or alias.name for alias in node.names}
        for place in ('annotation', 'returns'):
            if isinstance(getattr(node, place, None), ast.AST):
                spared |= {id(inner) for inner in ast.walk(getattr(node, place))}
    subscripts = (n for n in ast.walk(tree) if isinstance(n, ast.Subscript) and id(n) not in spared)
    return [n.value.id for n in subscripts if getattr(n.value, 'id', '') in generic]


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_can_be_imported_by_python_3_8(path):
    assert subscripted(ast.parse(path.read_text())) == [], 'take these from typing'


def test_what_python_3_8_cannot_import_is_found():
    code = 'from collections.abc import Iterable\nx: list[int] = []\nA = Iterable[int]\n'
    assert subscripted(ast.parse(code)) == ['Iterable']
