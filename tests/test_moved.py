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
