"""Modules as people bring them to export: their inputs and outputs, and what they keep."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.core.copies import tensors
from mmdet3d_quant.core.modes import float_state_dict, quantizers
from mmdet3d_quant.engines import ONNXRuntime
from mmdet3d_quant.export import export_onnx
from mmdet3d_quant.export.pairs import ExportError
from mmdet3d_quant.layers import QuantConv2d

X = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution within a forward that a test gives."""

    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.run, self.kept = QuantConv2d(3, 4, 1), run, None
        self.register_buffer('anchors', torch.arange(4.0))
        self.register_buffer('same', torch.arange(4.0))

    def forward(self, *args):
        return self.run(self, *args)


def net(run, *args):
    model = Net(run)
    calibrate(model, [tuple(args)], forward=lambda m, batch: m.conv(X))
    return model


@pytest.mark.parametrize(
    ('run', 'args'),
    [
        (lambda m, x: (m.conv(x), m.anchors), [X]),
        (lambda m, x: (m.conv(x), m.conv.bias, m.anchors, m.same), [X]),
        (lambda m, x: dict(z=m.conv(x)[:, : m.conv(x).argmax().clamp(1, 1)], a=m.conv(x)), [X]),
        (lambda m, x: (m.conv(x).flatten(1).topk(3)[0], [m.conv(x), {'a': m.conv(x + 1)}]), [X]),
        (lambda m, xs, y: m.conv(xs[0]) + m.conv(xs[1][0]) * y, [[X, (X + 1,)], X[:, :1]]),
        (lambda m, x: m.conv(x.mul_(2)), [X]),
    ],
    ids=['buffer', 'parameters', 'dict', 'nested', 'lists', 'in place'],
)
def test_engines_get_and_give_what_is_named_and_inputs_are_left_alone(run, args, tmp_path):
    model = net(run, *args)
    flat = [x.clone() for x in tensors(args)]
    names = [f'in{i}' for i in range(len(flat))]
    with torch.no_grad():
        expected = [y.clone() for y in tensors(model(*args))]
    for x, before in zip(tensors(args), flat):
        x.copy_(before)
    outputs = [f'out{i}' for i in range(len(expected))]
    export_onnx(model, args, tmp_path / 'net.onnx', names, outputs)
    assert all(torch.equal(x, before) for x, before in zip(tensors(args), flat))
    made = ONNXRuntime(tmp_path / 'net.onnx')({n: x.numpy() for n, x in zip(names, flat)})
    assert list(made) == outputs
    for name, value in zip(outputs, expected):
        np.testing.assert_allclose(made[name], value.numpy(), atol=1e-6)


def test_a_feature_that_a_module_keeps_from_training_does_not_stop_export(tmp_path):
    def run(m, x):
        m.kept = [m.conv(x)]
        return m.kept[0]

    model = net(run, X)
    model.train()(X).sum().backward()
    export_onnx(model, [X], tmp_path / 'net.onnx', ['x'], ['y'])
    assert model.training and model.kept[0].requires_grad


def test_layers_that_share_a_quantizer_each_get_its_pair(tmp_path):
    model = nn.Sequential(QuantConv2d(3, 3, 1), QuantConv2d(3, 3, 1))
    model[1]._input_quantizer = model[0]._input_quantizer
    calibrate(model, [X])
    graph = export_onnx(model, [X], tmp_path / 'net.onnx', ['x'], ['y']).graph
    pairs = [n for n in graph.node if n.op_type == 'QuantizeLinear']
    assert len(quantizers(model)) == 3 and len(pairs) == 4
    assert list(float_state_dict(model)) == ['0.weight', '0.bias', '1.weight', '1.bias']
    kinds = {n.op_type for n in graph.node}
    assert kinds == {'Constant', 'QuantizeLinear', 'DequantizeLinear', 'Conv'}


@pytest.mark.parametrize(
    ('run', 'args', 'names', 'message'),
    [
        (lambda m, x, z: m.conv(x), [X, X], (['x', 'z'], ['y']), 'does not depend on z'),
        (lambda m, x: (m.conv(x), x + 1), [X], (['x'], ['y']), 'returns 2 tensors'),
        (lambda m, x: F.dropout(m.conv(x)), [X], (['x'], ['y']), 'random'),
        (lambda m, x: m.conv(x) + torch.randn(1, 4, 6, 6), [X], (['x'], ['y']), 'random'),
        (lambda m, x, z: m.conv(x + z), [X, X], (['x', 'x'], ['y']), 'differ.*: x'),
        (lambda m, x: m.conv(x), [X], (['x'], ['x']), 'differ.*: x'),
        (lambda m, xs: m.conv(xs[0]), [[X, X]], (['x'], ['y']), '2 inputs, but names'),
        (lambda m, x: m.conv(x['a']), [{'a': X}], (['x'], ['y']), 'has a dict'),
        (lambda m, x: m.conv(x), X, (['x'], ['y']), r'\[tensor\]'),
        (lambda m, x: m.conv(x), [X], ('img', ['y']), r"\['img'\]"),
        (lambda m, x: m.conv(x), [X], (['x'], 'y'), r"\['y'\]"),
    ],
)
def test_what_is_no_graph_of_these_names_is_refused(run, args, names, message, tmp_path):
    model = net(run, *args)
    with pytest.raises((ExportError, ValueError), match=message):
        export_onnx(model, args, tmp_path / 'net.onnx', *names)
    assert list(tmp_path.iterdir()) == []


def test_arguments_with_defaults_become_no_inputs_without_a_word(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = QuantConv2d(3, 4, 1)

        def forward(self, x, scale=2.0):
            return self.conv(x) * scale

    model = Scaled()
    calibrate(model, [X])
    path = tmp_path / 'net.onnx'
    try:
        export_onnx(model, [X], path, ['x'], ['y'])
    except ExportError as err:  # torch's tracer makes an input of the number, or a constant
        assert 'defaults' in str(err) and not path.exists()
    else:
        assert [i.name for i in onnx.load(str(path)).graph.input] == ['x']


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_weights_of_another_precision_are_named(dtype, tmp_path):
    model = net(lambda m, x: m.conv(x), X).to(dtype)
    with pytest.raises(ExportError, match=rf'conv has weights of {dtype}.*float\(\)'):
        export_onnx(model, [X.to(dtype)], tmp_path / 'net.onnx', ['x'], ['y'])
