"""The exported graph: its nodes, its scales, and what two engines make of it."""

import copy

import numpy as np
import onnx
import pytest
import torch
from mmdet3d.registry import MODELS
from torch import nn

from mmdet3d_quant import UncalibratedError, calibrate, fold_bn, quantizers, set_mode
from mmdet3d_quant.check.lint import Graph, lint
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines import ONNXRuntime, OpenVINO
from mmdet3d_quant.engines.openvino.floats import overflows
from mmdet3d_quant.export import export_onnx
from mmdet3d_quant.layers import QuantConcat, QuantConv2d, QuantConvTranspose2d


@pytest.fixture(scope='module')
def backbone():
    torch.manual_seed(0)
    model = MODELS.build(
        dict(type='QuantResNet', depth=50, base_channels=16, skip=dict(conv1='stem'))
    )
    model.eval()
    x = torch.randn(1, 3, 64, 96)
    calibrate(model, [x])
    return model, x


@pytest.fixture(scope='module')
def exported(backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp('onnx') / 'backbone.onnx'
    model, x = backbone
    names = ['c2', 'c3', 'c4', 'c5']
    export_onnx(model, [x], path, ['img'], names)
    return onnx.load(path), path, names


def constants(graph):
    """Values of initializers and Constant nodes, by name."""
    values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    for node in graph.node:
        if node.op_type == 'Constant':
            values[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return values


def test_only_convolutions_and_qdq_are_left(exported):
    graph = exported[0].graph
    kinds = {n.op_type for n in graph.node} - {'Constant'}
    assert kinds == {'QuantizeLinear', 'DequantizeLinear', 'Conv', 'Relu', 'Add', 'MaxPool'}
    assert exported[0].opset_import[0].version == 17


def test_scales_are_those_of_the_buffers_and_zero_points_are_zero(backbone, exported):
    model = copy.deepcopy(backbone[0])
    fold_bn(model)
    expected = {
        n.replace('.', '/'): (q._amax.flatten() / 127).numpy()
        for n, q in quantizers(model).items()
        if q.calibrated
    }
    values = constants(exported[0].graph)
    seen = set()
    for node in exported[0].graph.node:
        if node.op_type not in ('QuantizeLinear', 'DequantizeLinear'):
            continue
        # Node names spell the path of the module: /layer1/layer1.0/conv1/_input_quantizer/...
        module = node.name.rsplit('/', 1)[0]
        name = next(n for n in expected if module.endswith(short(n)))
        scale, zero = values[node.input[1]], values[node.input[2]]
        assert np.array_equal(scale.flatten(), expected[name]), name
        assert zero.dtype == np.int8 and not zero.any() and zero.shape == scale.shape
        axis = [a.i for a in node.attribute if a.name == 'axis']
        assert axis == ([0] if 'weight' in name else [])
        seen.add(name)
    assert seen == set(expected)


def short(name):
    """'layer1/0/conv1/_input_quantizer' as torch writes it, 'layer1.0/conv1/...'."""
    parts = name.split('/')
    out = []
    for part in parts:
        out.append(f'{out[-1]}.{part}' if part.isdigit() else part)
    return '/' + '/'.join(out)


def test_engines_agree_with_torch(backbone, exported):
    model, x = backbone
    with torch.no_grad():
        expected = model(x)
        with set_mode(model, 'float'):
            floating = model(x)
    _, path, names = exported
    for engine in (ONNXRuntime(path), OpenVINO(path)):
        result = engine({'img': x.numpy()})
        for name, fake, real in strict_zip(names, expected, floating):
            assert sqnr(fake, result[name]) > sqnr(real, fake) + 3
    int8, all_convs = OpenVINO(path).int8_convolutions()
    assert (int8, all_convs) == (52, 53)  # the stem is kept float


@pytest.mark.parametrize('form', ['concat', 'quant_concat', 'transposed', 'signed'])
def test_openvino_runs_every_pattern_as_torch_does(form, tmp_path):
    """One INT8 layer each, where nothing but rounding ties can differ."""

    class Pattern(nn.Module):
        def __init__(self):
            super().__init__()
            kind = QuantConvTranspose2d if form == 'transposed' else QuantConv2d
            self.conv = kind(16, 8, 2)
            self.concat = QuantConcat() if form == 'quant_concat' else torch.cat

        def quant_ties(self):
            tied = form == 'quant_concat'
            return [['conv._input_quantizer', 'concat._input_quantizer']] if tied else []

        def forward(self, x, y):
            if form == 'concat':
                return self.conv(torch.cat([x, y], 1))
            if form == 'quant_concat':
                return self.conv(self.concat([x, y]))
            return self.conv(x.repeat(1, 2, 1, 1) - y.repeat(1, 2, 1, 1))

    torch.manual_seed(0)
    model, inputs = Pattern(), [torch.randn(1, 8, 12, 12), torch.randn(1, 8, 12, 12) * 3]
    if form != 'signed':
        inputs = [t.relu() for t in inputs]
    calibrate(model, [inputs])
    export_onnx(model, inputs, tmp_path / 'm.onnx', ['x', 'y'], ['out'])
    arrays = dict(strict_zip('xy', (t.numpy() for t in inputs)))
    expected = model(*inputs).detach()
    engine = OpenVINO(tmp_path / 'm.onnx')
    # Nothing says that these inputs are never negative, and not every CPU adds signed products.
    assert engine.int8_convolutions() == (int(not overflows()), 1)
    assert sqnr(expected, engine(arrays)['out']) > 45
    assert sqnr(expected, ONNXRuntime(tmp_path / 'm.onnx')(arrays)['out']) > 45


def test_float_variant_has_no_qdq_and_equals_the_model(backbone, tmp_path):
    model, x = backbone
    path = tmp_path / 'float.onnx'
    names = ['c2', 'c3', 'c4', 'c5']
    graph = export_onnx(model, [x], path, ['img'], names, quantized=False).graph
    assert not any('Linear' in n.op_type for n in graph.node)
    with set_mode(model, 'float'), torch.no_grad():
        expected = model(x)
    result = ONNXRuntime(path)({'img': x.numpy()})
    assert all(sqnr(e, result[n]) > 90 for n, e in strict_zip(names, expected))
    assert {q.mode for q in quantizers(model).values()} == {'quant', 'float'}  # as before


def test_errors_leave_no_file(tmp_path):
    path = tmp_path / 'm.onnx'
    x = torch.randn(1, 3, 8, 8)
    conv = QuantConv2d(3, 4, 1)
    with pytest.raises(UncalibratedError, match='_weight_quantizer'):
        export_onnx(conv, [x], path, ['x'], ['y'])
    calibrate(conv, [x])
    with pytest.raises(ValueError, match='opset'):
        export_onnx(conv, [x], path, ['x'], ['y'], opset_version=11)
    with pytest.raises(ValueError, match='1 inputs, but names'):
        export_onnx(conv, [x], path, ['x', 'z'], ['y'])
    with pytest.raises(OSError, match='cannot write'):
        export_onnx(conv, [x], '/dev/null/m.onnx', ['x'], ['y'])
    assert list(tmp_path.iterdir()) == []


def test_unequal_ties_are_refused(tmp_path):
    class Pair(nn.Sequential):
        def quant_ties(self):
            return [['0._input_quantizer', '1._input_quantizer']]

    pair, x = Pair(QuantConv2d(3, 3, 1), QuantConv2d(3, 3, 1)), torch.randn(1, 3, 8, 8)
    calibrate(pair, [x])
    pair[1]._input_quantizer.amax = 99.0
    with pytest.raises(ValueError, match='unequal ranges: 0._input_quantizer, 1._input'):
        export_onnx(pair, [x], tmp_path / 'm.onnx', ['x'], ['y'])


@pytest.mark.parametrize(('opset', 'ir'), [(13, 7), (17, 8), (18, 8), (19, 9), (20, 9), (21, 10)])
def test_opsets(opset, ir, tmp_path):
    """And the version of the format that came with each, by ONNX's own table."""
    conv, x = QuantConv2d(3, 4, 1), torch.randn(1, 3, 8, 8)
    calibrate(conv, [x])
    model = export_onnx(conv, [x], tmp_path / 'm.onnx', ['x'], ['y'], opset)
    assert model.opset_import[0].version == opset
    assert model.ir_version == onnx.load(tmp_path / 'm.onnx').ir_version == ir
    ONNXRuntime(tmp_path / 'm.onnx')({'x': x.numpy()})


def test_sqnr():
    signal = np.array([3.0, 4.0])
    assert sqnr(signal, signal) == np.inf
    assert sqnr(signal, signal + [0.5, 0]) == pytest.approx(20.0)
    assert np.isnan(sqnr(signal, [np.nan, 1])) and np.isnan(sqnr(signal, [np.inf, 1]))
    assert sqnr([0.0], [1.0]) == -np.inf


@pytest.mark.parametrize('engine', [ONNXRuntime, OpenVINO])
def test_a_swin_stage_within_one_window_is_run(tmp_path, engine):
    """Its shifted windows slice nothing, whose indices have no elements."""
    swin = MODELS.build(
        dict(
            type='mmdet.SwinTransformer',
            embed_dims=4,
            depths=(2, 2),
            num_heads=(1, 1),
            strides=(4, 2),
            out_indices=(1,),
        )
    )
    swin.eval()
    x = torch.randn(1, 3, 32, 56, generator=torch.Generator().manual_seed(0))
    path = tmp_path / 'swin.onnx'
    export_onnx(swin, [x], path, ['x'], ['y'], quantized=False)
    with torch.no_grad():
        expected = swin(x)[0]
    assert sqnr(expected, engine(path)({'x': x.numpy()})['y']) > 90


@pytest.mark.parametrize('target', ['tensorrt8', 'tensorrt10', 'tensorrt-rtx'])
def test_the_scale_of_a_layer_with_one_channel_is_a_number(target, tmp_path):
    """Engines refuse a list of one for FP16 weights."""
    torch.manual_seed(0)
    model = nn.Sequential(QuantConv2d(4, 8, 3), nn.ReLU(), QuantConv2d(8, 1, 1)).eval()
    x = torch.randn(1, 4, 8, 8)
    calibrate(model, [x])
    made = export_onnx(model, [x], tmp_path / 'm.onnx', ['x'], ['y'], target=target)
    assert not lint(Graph(made))
    values = constants(made.graph)
    shapes = [values[n.input[1]].shape for n in made.graph.node if n.op_type == 'DequantizeLinear']
    assert sorted(shapes) == [(), (), (), (8,)]
