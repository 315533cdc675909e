"""Channels with next to no weights: FP16 and every engine can hold their scales and biases."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.check.lint import lint, read_graph
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.engines import ONNXRuntime, OpenVINO
from mmdet3d_quant.export import export_onnx
from mmdet3d_quant.export.sparse import trace
from mmdet3d_quant.export.sparse.run import ScnNetwork
from mmdet3d_quant.export.weight_scales import raise_scales
from mmdet3d_quant.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear
from tests.export.sparse.encoders import calibrated, cloud

LAYERS = {
    'conv': lambda: QuantConv2d(8, 8, 3, padding=1),
    'grouped': lambda: QuantConv2d(8, 8, 3, padding=1, groups=2),
    'depthwise': lambda: QuantConv2d(8, 8, 3, padding=1, groups=8),
    'transposed': lambda: QuantConvTranspose2d(8, 8, 2, stride=2),
    'linear': lambda: QuantLinear(8, 8),
    'folded': lambda: nn.Sequential(QuantConv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)),
}
#: Largest weights of the channels, or their factors in batch norm; the first is an ordinary one.
SIZES = torch.tensor([1, 0, 1e-40, 1e-30, 1e-12, 1e-9, 1e-7, 1e-6])
ENGINES = {
    'as written': ONNXRuntime,
    'default': lambda path: ONNXRuntime(path, optimized=True),
    'openvino': OpenVINO,
}


def dying(kind, bias):
    """A calibrated layer of which one channel lives, and the rounding of the layer behind it."""
    torch.manual_seed(0)
    net = LAYERS[kind]().eval()
    with torch.no_grad():
        if kind == 'folded':
            net[1].weight.copy_(SIZES)
        else:
            rest = [d for d in range(net.weight.dim()) if d != net.weight_axis]
            shape = [-1 if d == net.weight_axis else 1 for d in range(net.weight.dim())]
            net.weight.mul_(SIZES.view(shape) / net.weight.abs().amax(rest, keepdim=True))
        (net[1] if kind == 'folded' else net).bias.copy_(torch.tensor([0.0, *7 * [bias]]))
    x = torch.rand(4, 8) if kind == 'linear' else torch.rand(1, 8, 6, 6)
    calibrate(net, [x])
    behind = Quantizer()
    behind.amax = 1.27 * abs(bias or 1)  # the bias is its hundredth step
    return nn.Sequential(net, behind).eval(), x


@pytest.mark.parametrize('bias', [0, 1, -1e4])
@pytest.mark.parametrize('kind', LAYERS)
def test_every_engine_computes_dead_channels_as_fake_quantization_does(kind, bias, tmp_path):
    net, x = dying(kind, bias)
    path, state = tmp_path / 'x.onnx', copy.deepcopy(net.state_dict())
    with torch.no_grad():
        wanted = net(x).numpy()
    for target in ('tensorrt', 'openvino'):
        for weights in ('float', 'int8'):
            export_onnx(net, [x], path, ['x'], ['y'], target=target, weights=weights)
            for name, engine in ENGINES.items():
                found = engine(path)({'x': x.numpy()})['y']
                error = np.abs(found - wanted).max()
                assert error <= 1e-6 * np.abs(wanted).max(), (name, target, weights)
            assert lint(read_graph(path)) == []
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def layer_with(weight, bias, amax):
    layer = QuantLinear(weight.shape[1], len(weight))
    layer.weight.data, layer.bias.data = weight, bias
    layer._weight_quantizer.amax = layer.weight_amax()
    layer._input_quantizer.amax = amax
    return layer.eval()


def test_scales_that_engines_can_hold_stay_to_the_bit():
    torch.manual_seed(0)
    layer = layer_with(torch.randn(6, 32) * 10.0 ** torch.arange(-4, 2)[:, None], torch.randn(6), 3)
    before = layer._weight_quantizer.amax.clone()
    raise_scales(layer)
    assert torch.equal(layer._weight_quantizer.amax, before)


def test_a_layer_of_small_weights_stays_and_is_found(tmp_path):
    torch.manual_seed(0)
    layer = layer_with(torch.randn(4, 32) * 1e-7, torch.zeros(4), 1e5)
    x = torch.randn(3, 32) * 2e4
    export_onnx(layer, [x], tmp_path / 'x.onnx', ['x'], ['y'])
    assert {f.rule.id for f in lint(read_graph(tmp_path / 'x.onnx'))} == {'Q24'}
    found = ONNXRuntime(tmp_path / 'x.onnx')({'x': x.numpy()})['y']
    assert sqnr(layer(x).detach(), found) > 100


@pytest.mark.parametrize('sign', [torch.randn, torch.rand])
def test_room_for_a_bias_costs_no_more_than_promised(sign):
    torch.manual_seed(0)
    layer = layer_with(sign(4, 4608) * 1e-3, torch.tensor([1e3, -1e4, 1e5, 1e6]), 0.1)
    x = sign(64, 4608) * 0.03
    wanted = layer(x)
    raise_scales(layer)
    step = layer._weight_quantizer.amax.flatten() / 127 * 0.1 / 255
    assert bool((layer.bias.abs() / step <= 2**30 * 1.001).all())
    for expected, found in zip(wanted.T.detach(), layer(x).T.detach()):
        assert sqnr(expected, found) > 65


def test_channels_of_sparse_convolutions_that_die_by_folding():
    model = calibrated('bevfusion')
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.weight.data[:4] = torch.tensor([0, 1e-12, 1e-30, -1e-6])
    voxels = cloud(model)
    with torch.no_grad():
        wanted = model(*voxels, 1)
    program = trace(model)
    ranges = [limit for op in program.convs for limit in op.weight_ranges or ()]
    assert ranges and (np.float16(np.array(ranges) / 127) > 0).all()
    assert sqnr(wanted, ScnNetwork(program)(*voxels)) > 40  # weights are stored in FP16
