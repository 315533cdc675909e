"""Engines: the same numbers on kernels that are faster, and errors that tell what is wrong."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.engines import ONNXRuntime, OpenVINO, make_engine, race
from mmdet3d_quant.engines.files import EngineError
from mmdet3d_quant.engines.openvino.floats import overflows
from mmdet3d_quant.engines.openvino.graph import prepare
from mmdet3d_quant.export import export_onnx
from mmdet3d_quant.layers import QuantConcat, QuantConv2d
from mmdet3d_quant.models.resnet import QuantBottleneck


class Net(nn.Module):
    """A max pooling, and a convolution and an add that read one tensor."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.conv = QuantConv2d(32, 32, 3, padding=1)
        self.last = QuantConv2d(32, 8, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.last((self.conv(x) + x).relu())


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():  # weights at both ends of their range, where sums grow large
        net.conv.weight.copy_(net.conv.weight.sign() * net.conv.weight.abs().max())
    calibrate(net, [x], 'max')
    path = tmp_path_factory.mktemp('engines') / 'net.onnx'
    export_onnx(net, [x], path, ['x'], ['y'])
    return path, dict(x=x.numpy())


def test_openvino_computes_what_the_file_says_in_int8(work):
    """On a CPU without VNNI signed kernels would leave 10 to 30 dB of this."""
    path, inputs = work
    engine = OpenVINO(path)
    assert engine.int8_convolutions() == (2, 3)  # the stem is float
    assert sqnr(ONNXRuntime(path)(inputs)['y'], engine(inputs)['y']) > 55


def test_negative_inputs_stay_negative(tmp_path):
    torch.manual_seed(0)
    conv, x = QuantConv2d(16, 8, 3), torch.randn(1, 16, 12, 12)
    calibrate(conv, [x], 'max')
    export_onnx(conv, [x], tmp_path / 'm.onnx', ['x'], ['y'])
    engine, inputs = OpenVINO(tmp_path / 'm.onnx'), dict(x=x.numpy())
    assert sqnr(ONNXRuntime(tmp_path / 'm.onnx')(inputs)['y'], engine(inputs)['y']) > 55
    assert engine.int8_convolutions() == (int(not overflows()), 1)


def test_a_product_of_two_signed_activations_is_run(tmp_path):
    """As in attention: none of the two is a weight."""
    node, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [node('MatMul', ['ad', 'bd'], ['y'])]
    for name in 'ba':
        nodes.insert(0, node('DequantizeLinear', [f'{name}q', 's', 'z'], [f'{name}d']))
        nodes.insert(0, node('QuantizeLinear', [name, 's', 'z'], [f'{name}q']))
    values = [onnx.numpy_helper.from_array(np.float32(4 / 127), 's')]
    values.append(onnx.numpy_helper.from_array(np.int8(0), 'z'))
    ends = [tensor(n, onnx.TensorProto.FLOAT, [1, 4, 4]) for n in 'aby']
    graph = onnx.helper.make_graph(nodes, 'product', ends[:2], ends[2:], values)
    opset = onnx.helper.make_opsetid('', 17)
    path = tmp_path / 'product.onnx'
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    rng = np.random.default_rng(0)
    inputs = {n: rng.standard_normal((1, 4, 4), np.float32) for n in 'ab'}
    expected = ONNXRuntime(path)(inputs)['y']
    assert sqnr(torch.from_numpy(expected), torch.from_numpy(OpenVINO(path)(inputs)['y'])) > 20


class Blocks(nn.Module):
    """A max pooling, two residual blocks, a concat of before and after, a result cut in two."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(QuantConv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2))
        down = nn.Sequential(QuantConv2d(16, 32, 1), nn.BatchNorm2d(32))
        self.blocks = nn.ModuleList(
            [QuantBottleneck(16, 8, downsample=down), QuantBottleneck(32, 8)]
        )
        self.concat = QuantConcat(1)
        self.last = QuantConv2d(48, 10, 1)

    def quant_ties(self):
        first = 'blocks.0.conv1._input_quantizer'
        return [[first, 'concat._input_quantizer', 'last._input_quantizer']]

    def forward(self, x):
        x = self.stem(x)
        y = self.last(self.concat([x, self.blocks[1](self.blocks[0](x))]))
        return y[:, :4], y[:, 4:]


@pytest.fixture(scope='module', params=('tensorrt', 'openvino'))
def blocks(tmp_path_factory, request):
    torch.manual_seed(0)
    net, x = Blocks().eval(), torch.randn(2, 3, 36, 36)
    calibrate(net, [x], 'max')
    path = tmp_path_factory.mktemp(request.param) / 'net.onnx'
    export_onnx(net, [x], path, ['x'], ['a', 'b'], target=request.param)
    return path, dict(x=x.numpy())


def layers(engine):
    """Type of the layer in which an operator of the file runs, by the operator's name."""
    found = {}
    for node in engine._compiled.get_runtime_model().get_ops():
        info = {k: v.astype(str) for k, v in node.get_rt_info().items()}
        for name in info.get('originalLayersNames', '').split(','):
            found[name] = info['layerType'], info['runtimePrecision']
    return found


def test_adds_pooling_and_cuts_run_in_the_int8_convolutions(blocks):
    path, inputs = blocks
    engine, reference = OpenVINO(path), ONNXRuntime(path)(inputs)
    outputs = engine(inputs)
    assert set(outputs) == {'a', 'b'}
    if 'openvino' not in path.parent.name or not overflows():
        assert all(sqnr(reference[name], outputs[name]) > 55 for name in outputs)
    found = layers(engine)
    assert {found[f'/blocks.{i}/Add'][0] for i in (0, 1)} == {'Convolution'}
    int8, convolutions = engine.int8_convolutions()
    assert convolutions == 10  # the last one is two now
    assert not any(kind in ('Split', 'StridedSlice') for kind, _ in found.values())
    if not overflows():  # else what reads the image is float
        assert int8 == convolutions
        assert found['/stem/stem.2/MaxPool'][1] in ('i8', 'u8')


def test_what_is_joined_from_rounded_parts_is_not_rounded_again(blocks):
    import openvino as ov

    model = ov.Core().read_model(str(blocks[0]))
    prepare(model)
    (concat,) = [n for n in model.get_ops() if n.get_friendly_name() == '/concat/Concat']
    readers = [i.get_node().get_type_name() for i in concat.output(0).get_target_inputs()]
    assert readers == ['Convolution', 'Convolution']


def test_values_above_the_range_are_cut_off_where_they_were(work):
    path, inputs = work
    large = {'x': inputs['x'] * 5}
    assert sqnr(ONNXRuntime(path)(large)['y'], OpenVINO(path)(large)['y']) > 55


def test_the_profile_has_the_layers_and_their_times(work):
    path, inputs = work
    layers = OpenVINO(path, profiling=True).profile(inputs, runs=2)
    kinds = [layer.kind for layer in layers]
    assert kinds.count('Convolution') == 3
    assert sum(layer.seconds for layer in layers) > 0


def test_engines_take_turns():
    calls = []
    engines = {name: lambda inputs, name=name: calls.append(name) for name in 'ab'}
    times = list(race(engines, {}, 2))
    assert calls == list('ababab') and len(times) == 2 and len(times[0]) == 2


@pytest.mark.parametrize('engine', ['openvino', 'onnxruntime'])
@pytest.mark.parametrize(
    ('harm', 'message'),
    [
        ('truncated', 'truncated, or no ONNX file'),
        ('empty', 'it is empty'),
        ('text', 'no ONNX file'),
        ('no weights', 'file with its weights is missing'),
        ('unknown op', 'Nonsense'),
        ('missing', 'does not exist; make it with'),
        ('huge', '2.0 GiB, and ONNX files end at 2 GiB'),
    ],
)
def test_a_file_that_cannot_be_run_says_why(work, tmp_path, engine, harm, message):
    path, whole = tmp_path / 'bad.onnx', work[0].read_bytes()
    if harm == 'truncated':
        path.write_bytes(whole[: len(whole) // 2])
    elif harm == 'empty':
        path.write_bytes(b'')
    elif harm == 'text':
        path.write_text('{"not": "a graph"}\n' * 100)
    elif harm == 'no weights':
        onnx.save(
            onnx.load(work[0]), path, save_as_external_data=True, location='w', size_threshold=0
        )
        (tmp_path / 'w').unlink()
    elif harm == 'unknown op':
        model = onnx.load(work[0])
        model.graph.node[-1].op_type = 'Nonsense'
        onnx.save(model, path)
    elif harm == 'huge':
        with open(path, 'wb') as file:
            file.truncate(2**31)
    with pytest.raises(EngineError, match=message) as info:
        make_engine(engine, path)
    assert 'bad.onnx' in str(info.value)


@pytest.mark.parametrize('engine', ['openvino', 'onnxruntime', 'onnxruntime:default'])
@pytest.mark.parametrize('wrong', [np.nan, np.inf])
@pytest.mark.parametrize('what', ['bias', 'scale'])
def test_numbers_that_are_not_finite_are_named_with_their_layer(
    work, tmp_path, engine, wrong, what
):
    model = onnx.load(work[0])
    layer = next(n for n in model.graph.node if n.op_type == 'Conv' and 'last' in n.name)
    reader = next(n for n in model.graph.node if n.output[0] == layer.input[1])
    name = layer.input[2] if what == 'bias' else reader.input[1]
    tensors = {i.name: i for i in model.graph.initializer}
    tensors.update((n.output[0], n.attribute[0].t) for n in model.graph.node if not n.input)
    tensor = tensors[name]
    value = onnx.numpy_helper.to_array(tensor).copy()
    value.flat[3] = wrong
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    onnx.save(model, tmp_path / 'bad.onnx')
    with pytest.raises(EngineError, match='1 of the 8 numbers of tensor') as info:
        make_engine(engine, tmp_path / 'bad.onnx')
    assert name in str(info.value) and layer.name in str(info.value)


def test_a_mask_of_minus_infinity_is_run(tmp_path):
    mask = np.float32([0, -np.inf, 0, 0])
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node('Add', ['x', 'mask'], ['a']),
            onnx.helper.make_node('Softmax', ['a'], ['y']),
        ],
        'masked',
        [info('x', onnx.TensorProto.FLOAT, [1, 4])],
        [info('y', onnx.TensorProto.FLOAT, [1, 4])],
        [onnx.numpy_helper.from_array(mask, 'mask')],
    )
    opset = onnx.helper.make_opsetid('', 17)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / 'm.onnx'
    )
    for engine in ('openvino', 'onnxruntime'):
        y = make_engine(engine, tmp_path / 'm.onnx')({'x': np.zeros((1, 4), np.float32)})['y']
        np.testing.assert_allclose(y, [[1 / 3, 0, 1 / 3, 1 / 3]], 1e-5, 1e-6)


def test_onnxruntime_runs_with_its_default_optimisations_too(work):
    path, inputs = work
    plain, fused = make_engine('onnxruntime', path), make_engine('onnxruntime:default', path)
    assert sqnr(plain(inputs)['y'], fused(inputs)['y']) > 55
    options = [e._session.get_session_options().graph_optimization_level for e in (plain, fused)]
    assert options[0] != options[1]


def test_inputs_that_do_not_fit_are_named(work):
    path, inputs = work
    for engine in (OpenVINO(path), ONNXRuntime(path)):
        assert engine.input_shapes == {'x': (1, 3, 32, 32)}
        with pytest.raises(ValueError, match="input 'x' is missing"):
            engine({})
        with pytest.raises(ValueError, match=r"'x' has shape \(1, 3, 16, 32\), the graph wants"):
            engine({'x': inputs['x'][:, :, :16]})


def test_an_unknown_engine_is_an_error(work):
    with pytest.raises(EngineError, match="no engine 'tvm'; there are openvino, onnxruntime"):
        make_engine('tvm', work[0])


@pytest.mark.parametrize('name', ['onnxruntime', 'openvino'])
def test_an_engine_needs_a_thread(name, tmp_path):
    with pytest.raises(EngineError, match='at least 1 thread, got 0'):
        make_engine(name, tmp_path / 'none.onnx', 0)
