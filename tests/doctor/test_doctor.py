"""What the doctor says, against what others say of the same environment, and of planted ones."""

import ast
import copy
import json
import os
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mmdet3d_quant.doctor import NOTE, OK, SLOW, WRONG, facts, judge
from mmdet3d_quant.doctor.packages import PACKAGES, fits
from mmdet3d_quant.engines.tensorrt_rtx import compiler
from tests.matrix import requirements
from tests.small import ROOT

TOOL = ROOT / 'tools/doctor.py'
ROOM = ROOT / 'mmdet3d_quant/doctor'


def run(python, *words, **env):
    command = [str(python), str(TOOL), *words]
    names = {**os.environ, 'OMP_NUM_THREADS': '1', **env}
    names.pop('PYTHONPATH', None)
    return subprocess.run(command, capture_output=True, text=True, env=names, timeout=600)


@pytest.fixture(scope='module')
def here():
    """What it says of the environment of the tests."""
    told = run(sys.executable, '--json')
    assert 'Traceback' not in told.stderr
    return told.returncode, json.loads(told.stdout)


def test_versions_are_those_that_the_packages_have(here):
    lines = {line['name']: line for line in here[1]['lines']}
    for package in PACKAGES:
        for name in (package.name, *package.others):
            try:
                version = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
            assert lines[package.name]['found'].startswith(version)
            assert name == package.name or name in lines[package.name]['found']
            break
    assert lines['torch']['status'] == OK


def test_it_sees_the_machine_that_torch_sees(here):
    import torch

    told = here[1]['facts']['imports']['torch']
    assert len(told['gpus']) == torch.cuda.device_count() and told['threads'] == 1
    assert here[1]['facts']['processor']['cores'] <= os.cpu_count()


@pytest.mark.skipif(not facts.CPUINFO.exists(), reason='no /proc/cpuinfo')
@pytest.mark.parametrize('flag', facts.INSTRUCTIONS)
def test_instructions_are_those_of_the_system(here, flag):
    has = subprocess.run(['grep', '-qw', flag, facts.CPUINFO]).returncode == 0
    assert (flag in here[1]['facts']['processor']['instructions']) == has


def test_exit_code_follows_from_the_lines(here):
    code, told = here
    assert code == any(line['status'] == WRONG for line in told['lines'])


def test_it_asks_for_what_setup_py_asks_for():
    asked = {PACKAGE.wanted for PACKAGE in PACKAGES}
    needed = requirements()
    central = [r for r in needed[''] if re.match('numpy|mm|pytorch-q', r)]
    engines = [r for r in needed['export'] if not r.startswith('psutil')]
    assert len(central) == 5 and {*central, *engines, needed['compiler'][1]} <= asked
    (rtx,) = (p for p in PACKAGES if p.name.startswith('tensorrt-rtx'))
    assert rtx.install == compiler.INSTALL


@pytest.mark.parametrize('wanted', [p.wanted for p in PACKAGES] + ['x>=1.9,<1.10'])
def test_versions_fit_as_pip_takes_them(wanted):
    given = '0.9 0.10 0.10.7 0.11 1.4.0 1.9.5 1.10 1.26.4 2 2.0.0 2.1.3 2.2 3.3 2024.0 1.7.1.116'
    bounds = SpecifierSet(wanted[re.match(r'[\w-]+', wanted).end() :])
    for text in given.split():
        assert fits(text, wanted) == (Version(text) in bounds), text
    assert fits('2.1.2+cu121', 'torch>=2.0,<2.2') and fits('2.0.0rc4', 'x>=2.0')


def test_it_knows_the_standard_library_and_its_version_alone():
    """Or it would be silent where it is needed most."""
    known = {'mmdet3d_quant', *getattr(sys, 'stdlib_module_names', ())}
    if len(known) == 1:
        pytest.skip('no list of the standard library')
    for path in [*ROOM.glob('*.py'), TOOL]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {n.name.partition('.')[0] for n in node.names} <= known, path
            elif isinstance(node, ast.ImportFrom):
                first, *rest = node.module.split('.')
                own = first == 'mmdet3d_quant'
                assert first in known and (not own or rest[0] in ('doctor', 'version')), path
    version = ast.parse((ROOM.parent / 'version.py').read_text())
    assert not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(version))


# Environments that are planted.


@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    """A Python without packages, and its folder of packages."""
    folder = tmp_path_factory.mktemp('bare')
    venv.create(folder)
    python = folder / 'bin/python'
    where = subprocess.run(
        [python, '-c', 'import site; print(site.getsitepackages()[0])'],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return python, where.stdout.strip()


def test_an_empty_environment_is_told_what_it_lacks(bare):
    told = run(bare[0], '--json')
    assert told.returncode == 1 and told.stderr == ''
    lines = {line['name']: line for line in json.loads(told.stdout)['lines']}
    for package in PACKAGES:
        line = lines[package.name]
        assert line['found'] == 'not installed' and line['remedy'] == package.remedy
        assert line['status'] == (NOTE if package.without else WRONG)
    assert 'No module named' in lines['mmdet3d-quant']['says']
    assert repr(lines['mmdet3d-quant']['found']) in (ROOT / 'mmdet3d_quant/version.py').read_text()


def test_old_and_broken_packages_are_told(bare):
    """Packages of one's own making, found as those of pip are."""
    python, site = bare
    made = {
        'mmdet': ('2.28.1', ''),
        'mmengine': ('0.10.7', 'import os; print("hello"); os.abort()'),
        'numpy': ('1.26.4', 'raise ImportError("libGL.so.1: cannot open shared object file")'),
        'openvino': ('2026.4.1', 'raise SystemExit(3)'),
        'onnx': ('1.16.0', '__version__ = "1.16.0"'),
    }
    for name, (version, code) in made.items():
        (Path(site) / name).mkdir()
        (Path(site) / name / '__init__.py').write_text(code)
        info = Path(site) / f'{name}-{version}.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    told = run(python)
    assert told.returncode == 1 and told.stderr == ''
    shown = ' '.join(told.stdout.split())
    assert "wrong mmdet 2.28.1 mmdet>=3.2,<3.4 is needed do: pip install 'mmdet>=3.2,<3.4'" in shown
    assert 'wrong mmengine 0.10.7 cannot be imported: the process crashed with SIGABRT' in shown
    assert 'wrong numpy 1.26.4 cannot be imported: ImportError: libGL' in shown
    assert 'apt-get install libgl1' in shown and 'ok onnx 1.16.0' in shown
    assert 'wrong openvino 2026.4.1 cannot be imported: SystemExit: 3' in shown


def test_an_import_that_never_ends_is_given_up(tmp_path):
    (tmp_path / 'slow_one').mkdir()
    (tmp_path / 'slow_one/__init__.py').write_text('import time; time.sleep(60)')
    (tmp_path / 'good').mkdir()
    (tmp_path / 'good/__init__.py').write_text('__version__ = "7"')
    told = facts.try_imports(['slow_one', 'nowhere', 'good'], timeout=3, home=tmp_path)
    assert set(told) == {'slow_one', 'good'} and 'longer than 3 s' in told['slow_one']['error']
    assert told['good']['version'] == '7' and told['good']['error'] == ''


# Lines, from facts of a machine that has all.

GPU = dict(name='NVIDIA A', sm=[8, 6], bytes=2**34)
WELL = dict(
    python='3.10.1',
    system='Linux',
    machine='x86_64',
    versions={
        'numpy': '1.26.4', 'torch': '2.4.1', 'mmengine': '0.10.7', 'mmcv': '2.1.0',
        'mmdet': '3.3.0', 'mmdet3d': '1.4.0', 'pytorch-quantization': '2.1.3', 'spconv': '2.3.8',
        'onnx': '1.17.0', 'onnxruntime': '1.19', 'openvino': '2024.4.0', 'tensorrt': '10.1.0',
        'tensorrt-rtx-cu12-bindings': '1.7.1.116', 'safetensors': '0.4', 'triton': '3.0.0',
        'mmdet3d-quant': '0.1.0',
    },
    imports={p.module: dict(error='') for p in PACKAGES},
    processor=dict(name='CPU', cores=8.0, instructions=['avx2', 'avx512_vnni', 'avx512_bf16']),
    programs={'c++': '/usr/bin/c++', 'cc': '/usr/bin/cc', 'nvcc': None, 'nvidia-smi': None},
    variables={},
    driver=True,
)  # fmt: skip
WELL['imports'].update(triton=dict(error=''), mmdet3d_quant=dict(error=''))
WELL['imports']['torch'].update(
    threads=8, cuda='12.1', gpus=[GPU], archs=['sm_80', 'sm_90'], dynamo=False
)
WELL['imports']['mmcv.ops'].update(cuda='12.1')
NO_GPU = {'imports.torch.gpus': []}
LITE = {'versions.mmcv': None, 'versions.mmcv-lite': '2.1.0'}
LITE['imports.mmcv.ops'] = dict(error="No module named 'mmcv._ext'")
NO_VNNI = {'processor.instructions': ['avx2']}


def changed(changes):
    """Facts with some others, by dotted path; None takes a thing away."""
    now = copy.deepcopy(WELL)
    for path, value in changes.items():
        at, keys = now, re.split(r'\.(?!ops|pytorch)', path)
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
    return now


def test_nothing_is_said_against_a_machine_that_has_all():
    assert {line.status for line in judge(WELL)} == {OK}


@pytest.mark.parametrize(
    'changes, name, status, remedy',
    [
        ({'python': '3.7.9'}, 'python', WRONG, 'environment'),
        ({'python': '3.13.0'}, 'python', NOTE, ''),
        ({'versions.numpy': '2.1.0'}, 'numpy', WRONG, 'numpy<2'),
        ({'versions.mmcv': '2.2.0'}, 'mmcv', WRONG, 'mmcv==2.1.0'),
        (LITE, 'mmcv', WRONG, 'WITH_OPS'),
        ({'imports.mmcv.ops': dict(error='undefined symbol: _ZN3c10')}, 'mmcv', WRONG, 'again'),
        ({'versions.onnxruntime-gpu': '1.19'}, 'onnxruntime twice', WRONG, 'uninstall'),
        ({'imports.torch.dynamo': True}, 'exporter', NOTE, ''),
        ({'imports.torch.threads': 64}, 'threads', SLOW, 'OMP_NUM_THREADS=8'),
        (NO_GPU, 'gpu', WRONG, 'driver'),
        ({**NO_GPU, 'driver': False}, 'gpu', SLOW, 'GPU'),
        ({**NO_GPU, 'variables.CUDA_VISIBLE_DEVICES': ''}, 'gpu', SLOW, 'GPU'),
        ({**NO_GPU, 'driver': False}, 'spconv on the CPU', WRONG, 'OMP_NUM_THREADS=1'),
        ({'imports.torch.archs': ['sm_70', 'sm_90']}, 'gpu', WRONG, 'newer CUDA'),
        ({'imports.torch.gpus': [dict(GPU, sm=[6, 1])], 'imports.torch.archs': ['sm_61']}, 'gpu',
         SLOW, 'Turing'),
        ({'imports.mmcv.ops.cuda': 'not available'}, 'mmcv on the GPU', WRONG, 'FORCE_CUDA'),
        ({'versions.triton': '2.1.0'}, 'triton', SLOW, 'Triton 3'),
        ({'imports.triton': dict(error='ImportError: x')}, 'triton', SLOW, 'Linux'),
        ({'programs.cc': None}, 'triton', WRONG, 'gcc'),
        ({'programs.c++': None}, 'c++', SLOW, 'g++'),
        (NO_VNNI, 'INT8 in OpenVINO', WRONG, 'engines.OpenVINO'),
        ({'variables.ONEDNN_MAX_CPU_ISA': 'avx2'}, 'INT8 in OpenVINO', WRONG, 'unset'),
        (NO_VNNI, 'bfloat16', SLOW, '--amp'),
        ({'processor.instructions': []}, 'instructions', SLOW, 'another CPU'),
        ({'processor.instructions': None}, 'instructions', NOTE, ''),
    ],
)  # fmt: skip
def test_what_is_amiss_is_told_with_its_remedy(changes, name, status, remedy):
    lines = [line for line in judge(changed(changes)) if line.name == name]
    assert [line for line in lines if line.status == status and remedy in line.remedy], lines
    for line in judge(changed(changes)):
        assert line.remedy or line.status in (OK, NOTE), line


def test_gpus_of_a_later_generation_run_by_ptx():
    archs = ['sm_80', 'compute_80']
    told = judge(
        changed({'imports.torch.gpus': [dict(GPU, sm=[12, 0])], 'imports.torch.archs': archs})
    )
    assert {line.status for line in told} == {OK}


def test_a_container_has_the_cores_that_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, 'QUOTA', tmp_path / 'cpu.max')
    whole = facts.cores()
    (tmp_path / 'cpu.max').write_text('max 100000\n')
    assert facts.cores() == whole
    (tmp_path / 'cpu.max').write_text('50000 100000\n')
    assert facts.cores() == 0.5
