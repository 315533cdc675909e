"""Files with mmcv's deformable convolutions, in engines that know them under other names."""

import warnings

import pytest
import torch
from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.engines import ENGINES, EngineError, onnxruntime
from mmdet3d_quant.engines.deformable import runs_here
from mmdet3d_quant.export import export_onnx
from mmdet3d_quant.export.graph import custom_ops
from mmdet3d_quant.layers import QuantConv2d
from tests.versions import DEFORMABLE_ENGINES, without_old_onnxruntime

X = torch.randn(2, 8, 12, 10, generator=torch.Generator().manual_seed(0))
SHAPE = dict(kernel_size=3, stride=2, padding=2, dilation=2, groups=2, deform_groups=2)


def net(kind, **shape):
    """A deformable convolution that samples several pixels away, between two others."""
    torch.manual_seed(0)
    deformable = kind(8, 8, **shape)
    nn.init.normal_(deformable.conv_offset.weight, std=0.2)
    nn.init.normal_(deformable.conv_offset.bias, std=2)
    layers = (QuantConv2d(8, 8, 3, padding=1), nn.ReLU(), deformable, QuantConv2d(8, 4, 1))
    return nn.Sequential(*layers).eval()


def exported(module, path, x=X, **options):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return export_onnx(module, [x], path, ['x'], ['y'], custom_ops=True, **options)


@pytest.mark.parametrize('engine', DEFORMABLE_ENGINES)
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('kind', [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_engines_compute_what_mmcv_does(kind, bias, engine, tmp_path):
    own = dict(bias=True) if bias and kind is ModulatedDeformConv2dPack else dict(bias=False)
    module = net(kind, **SHAPE, **own)
    model = exported(module, tmp_path / 'float.onnx', quantized=False)
    (name,) = custom_ops(model)
    assert name == f'mmcv::MMCV{kind.__name__[: -len("Pack")]}' and runs_here([name])
    found = ENGINES[engine](tmp_path / 'float.onnx')({'x': X.numpy()})['y']
    with torch.no_grad():
        assert sqnr(module_in_float(module)(X), found) > 100


def module_in_float(module):
    from mmdet3d_quant.core.modes import set_mode

    set_mode(module, 'float')
    return module


@without_old_onnxruntime
@pytest.mark.parametrize('target', ['tensorrt8', 'tensorrt10', 'openvino'])
def test_quantized_files_of_every_target_run(target, tmp_path):
    module = net(ModulatedDeformConv2dPack, kernel_size=3, padding=1)
    calibrate(module, [X], 'max')
    exported(module, tmp_path / 'int8.onnx', target=target)
    with torch.no_grad():
        wanted = module(X)
    for engine in ('onnxruntime', 'openvino'):
        found = ENGINES[engine](tmp_path / 'int8.onnx')({'x': X.numpy()})['y']
        assert sqnr(wanted, found) > 30, engine


def test_an_old_runtime_is_told_before_it_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(onnxruntime, '_DEFORMABLE', (99, 0))
    module = net(DeformConv2dPack, kernel_size=3, padding=1)
    exported(module, tmp_path / 'float.onnx', quantized=False)
    with pytest.raises(EngineError, match=r'from 99\.0 on.*engine openvino'):
        ENGINES['onnxruntime'](tmp_path / 'float.onnx')
    assert not onnxruntime.has_deformable()


def test_an_operator_of_nobody_is_none_of_them():
    assert not runs_here(['mmcv::MMCVModulatedDeformConv2d', 'nv::CustomLayerNormalization'])
