"""Paths of 0.1 still work, say where the module went, and are the module itself."""

import importlib
import subprocess
import sys

import pytest

from mmdet3d_quant.moved import MOVED


@pytest.mark.parametrize('old, new', MOVED.items())
def test_an_old_path_gives_the_new_module(old, new):
    sys.modules.pop(f'mmdet3d_quant.{old}', None)
    wanted = importlib.import_module(f'mmdet3d_quant.{new}')
    spec = wanted.__spec__
    with pytest.warns(FutureWarning, match=rf'mmdet3d_quant\.{old} is mmdet3d_quant\.{new} now'):
        found = importlib.import_module(f'mmdet3d_quant.{old}')
    assert found is wanted and found.__spec__ is spec


def test_old_imports_as_users_wrote_them():
    code = """
from mmdet3d_quant.fold import fold_bn
from mmdet3d_quant.export.engines import OpenVINO, make_engine
from mmdet3d_quant.files import CheckpointError, read_checkpoint, whole
from mmdet3d_quant import from_config as fc
import mmdet3d_quant.export.lint.rules
import mmdet3d_quant as mq
assert fold_bn is mq.fold_bn and fc.build_model and mq.export.export_onnx
assert mq.modes.require_calibrated and mq.quantizer.Quantizer  # attributes, too
"""
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_functions_stay_functions():
    """``mq.ties(model)`` and a module ``mmdet3d_quant.ties`` share a name, and so do others."""
    code = """
import importlib, types, warnings
import mmdet3d_quant as mq
import mmdet3d_quant.export.sparse as sparse
from mmdet3d_quant.moved import MOVED
names = ('calibration', 'export', 'qat')
packages = [mq, sparse, *(importlib.import_module(f'mmdet3d_quant.{n}') for n in names)]
kind = types.FunctionType
before = [(p, n, v) for p in packages for n, v in vars(p).items() if isinstance(v, kind)]
warnings.simplefilter('ignore')
for old in MOVED:
    importlib.import_module(f'mmdet3d_quant.{old}')
assert len(before) > 10 and all(getattr(p, n) is v for p, n, v in before)
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
