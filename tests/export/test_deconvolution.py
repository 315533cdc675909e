"""Transposed convolutions as 1x1 convolutions, and a shuffle: the same bits, in two engines."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.check.lint import Graph, lint
from mmdet3d_quant.check.lint.layers import coverage, layers
from mmdet3d_quant.engines import ONNXRuntime, OpenVINO
from mmdet3d_quant.export import export_onnx
from mmdet3d_quant.layers import QuantConv2d, QuantConvTranspose2d


def net(kernel=2, stride=2, channels=6, bias=True, inputs=4, **kwargs):
    torch.manual_seed(0)
    up = QuantConvTranspose2d(inputs, channels, kernel, stride, bias=bias, **kwargs)
    model = nn.Sequential(
        QuantConv2d(3, inputs, 3), nn.ReLU(), up, nn.ReLU(), QuantConv2d(channels, 5, 1)
    )
    calibrate(model.eval(), [torch.randn(2, 3, 9, 7)])
    return model


def export(model, path, **kwargs):
    x = torch.randn(1, 3, 9, 7, generator=torch.Generator().manual_seed(1))
    return export_onnx(model, [x], path, ['x'], ['y'], **kwargs), x.numpy()


@pytest.mark.parametrize('engine', [ONNXRuntime, OpenVINO])
@pytest.mark.parametrize('weights', ['float', 'int8'])
@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        dict(bias=False),
        dict(kernel=4, stride=4),
        dict(kernel=1, stride=1),
        dict(channels=1),
        dict(channels=4),
        dict(kernel=4, padding=1, groups=4, channels=4),
        dict(kernel=4, padding=1, inputs=1, channels=1),
        dict(kernel=8, stride=4, padding=2, groups=4, channels=4, bias=False),
    ],
)
def test_it_is_the_same_function(kwargs, weights, engine, tmp_path):
    model = net(**kwargs)
    new, x = export(model, tmp_path / 'new.onnx', weights=weights)
    old, _ = export(model, tmp_path / 'old.onnx', weights=weights, target='openvino')
    kinds = [[n.op_type for n in m.graph.node] for m in (new, old)]
    assert 'ConvTranspose' not in kinds[0]
    assert ('DepthToSpace' in kinds[0]) == (kwargs.get('kernel') != 1)
    assert 'ConvTranspose' in kinds[1] and 'DepthToSpace' not in kinds[1]
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    step = float(model[4]._input_quantizer.amax) / 127 * float(model[4].weight.abs().max())
    found = engine(tmp_path / 'new.onnx')({'x': x})['y']
    assert np.abs(found - expected).max() < step  # roundings at a tie of the last layer's input
    assert np.abs(found - expected).mean() < 1e-3 * np.abs(expected).mean()
    assert lint(Graph(new)) == [] and coverage(layers(Graph(new))) == 1


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(kernel=3),
        dict(kernel=4, padding=1),
        dict(kernel=2, output_padding=1),
        dict(kernel=(2, 4), stride=(2, 4)),
        dict(kernel=2, groups=2),
        dict(kernel=4, padding=1, groups=2, channels=4),
        dict(kernel=4, padding=1, groups=4, channels=8),
        dict(kernel=4, padding=2, groups=4, channels=4),
        dict(kernel=6, stride=3, padding=1, groups=4, channels=4),
    ],
)
def test_others_stay(kwargs, tmp_path):
    model, x = export(net(**kwargs), tmp_path / 'm.onnx')
    assert 'ConvTranspose' in [n.op_type for n in model.graph.node]


def test_float_ones_stay_and_several_are_told_apart(tmp_path):
    model = net()
    plain, _ = export(model, tmp_path / 'float.onnx', quantized=False)
    assert 'ConvTranspose' in [n.op_type for n in plain.graph.node]
    torch.manual_seed(0)
    shared = QuantConvTranspose2d(4, 4, 2, 2)
    twice = nn.Sequential(QuantConv2d(3, 4, 3), shared, shared).eval()  # one weight, two layers
    calibrate(twice, [torch.randn(1, 3, 9, 7)])
    found, x = export(twice, tmp_path / 'twice.onnx')
    assert [n.op_type for n in found.graph.node].count('DepthToSpace') == 2
    with torch.no_grad():
        expected = twice(torch.from_numpy(x)).numpy()
    y = ONNXRuntime(tmp_path / 'twice.onnx')({'x': x})['y']
    assert np.abs(y - expected).max() < 1e-4 * np.abs(expected).max()
    onnx.checker.check_model(str(tmp_path / 'twice.onnx'), full_check=True)
