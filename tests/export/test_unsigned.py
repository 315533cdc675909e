"""Unsigned activations: only where a tensor cannot be negative, all of a tie group or none."""

import numpy as np
import onnx
import pytest
import torch
from mmdet3d.registry import MODELS
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mmdet3d_quant import calibrate, quantizers, set_mode, ties
from mmdet3d_quant.check.lint import Graph, lint, read_graph
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.core.spec import QuantSpec
from mmdet3d_quant.core.unsigned import load_unsigned_ranges, unsigned_ranges
from mmdet3d_quant.engines import ONNXRuntime
from mmdet3d_quant.export import export_onnx
from mmdet3d_quant.export.nonnegative import nonnegative_tensors
from mmdet3d_quant.export.unsigned import unsigned_names, with_unsigned
from mmdet3d_quant.layers import QuantConcat, QuantConv2d

FLOAT = TensorProto.FLOAT
CONSTANTS = dict(
    sizes=np.int64([1, 2, 8, 8]),
    shape=np.int64([1, 2, 16]),
    pads=np.int64([0, 0, 1, 1, 0, 0, 1, 1]),
    zero=np.float32(0),
    six=np.float32(6),
    below=np.float32(-1),
    third=np.float32(1 / 3),
    z8=np.int8(0),
    z3=np.int8(3),
    plus=np.float32([[[[0.5]], [[2.0]]]]),
    minus=np.float32([[[[0.5]], [[-2.0]]]]),
)

#: What makes y of x, any sign, and p, non-negative; and whether y is non-negative for sure.
FORMS = {
    'relu': (('Relu', 'x'), True),
    'sigmoid': (('Sigmoid', 'x'), True),
    'softmax': (('Softmax', 'x'), True),
    'the input': (('Identity', 'x'), False),
    'clip at 0': (('Clip', 'x zero six'), True),
    'clip below 0': (('Clip', 'x below six'), False),
    'clip without a minimum': (('Clip', 'x  six'), False),
    'clip of p': (('Clip', 'p below six'), True),
    'max with p': (('Max', 'x p'), True),
    'min with p': (('Min', 'x p'), False),
    'max pool': (('MaxPool', 'p', dict(kernel_shape=[2, 2])), True),
    'max pool of x': (('MaxPool', 'x', dict(kernel_shape=[2, 2])), False),
    'concat': (('Concat', 'p p', dict(axis=1)), True),
    'concat with x': (('Concat', 'p x', dict(axis=1)), False),
    'add': (('Add', 'p p'), True),
    'add x': (('Add', 'p x'), False),
    'add a constant': (('Add', 'p plus'), True),
    'add a negative constant': (('Add', 'p minus'), False),
    'subtract': (('Sub', 'p p'), False),
    'times x': (('Mul', 'p x'), False),
    'linear': (('Resize', 'p   sizes', dict(mode='linear')), True),
    'nearest': (('Resize', 'p   sizes', dict(mode='nearest')), True),
    'cubic': (('Resize', 'p   sizes', dict(mode='cubic')), False),
    'linear of x': (('Resize', 'x   sizes', dict(mode='linear')), False),
    'pad': (('Pad', 'p pads'), True),
    'pad below 0': (('Pad', 'p pads below'), False),
    'pad by reflection': (('Pad', 'p pads', dict(mode='reflect')), True),
    'reshape': (('Reshape', 'p shape'), True),
    'conv': (('Conv', 'p kernel'), False),
    'cast to int8': (('Cast', 'p', dict(to=TensorProto.INT8)), False),
    'cast to half': (('Cast', 'p', dict(to=TensorProto.FLOAT16)), True),
    'Q': (('QuantizeLinear', 'p third z8'), True),
    'Q of x': (('QuantizeLinear', 'x third z8'), False),
    'Q with a zero point': (('QuantizeLinear', 'p third z3'), False),
    'another domain': (('Relu', 'x', dict(domain='nv')), False),
}


def graph_of(kind, names, attributes):
    inputs = [helper.make_tensor_value_info(n, FLOAT, [1, 2, 4, 4]) for n in 'xr']
    weight = np.float32(np.linspace(-1, 1, 2 * 2 * 4).reshape(2, 2, 2, 2))
    nodes = [
        helper.make_node('Relu', ['r'], ['p']),
        helper.make_node(kind, names.split(' '), ['y'], **attributes),
    ]
    stored = [
        numpy_helper.from_array(np.asarray(v), n)
        for n, v in dict(CONSTANTS, kernel=weight).items()
        if n in names.split(' ')
    ]
    out = helper.make_empty_tensor_value_info('y')
    graph = helper.make_graph(nodes, 'g', inputs, [out], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)


@pytest.mark.parametrize('name', FORMS)
def test_signs_are_proved_and_the_proof_holds_in_an_engine(name, tmp_path):
    (kind, names, *attributes), expected = FORMS[name]
    model = graph_of(kind, names, attributes[0] if attributes else {})
    assert ('y' in nonnegative_tensors(model.graph)) is expected
    assert 'p' in nonnegative_tensors(model.graph)
    if 'domain' in (attributes[0] if attributes else {}):
        return  # no engine has it
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / 'm.onnx')
    rng = np.random.default_rng(0)
    fed = {n: np.float32(rng.normal(0, 200, (1, 2, 4, 4))) for n in 'xr'}
    found = ONNXRuntime(tmp_path / 'm.onnx')(fed)['y']
    # What is refused is refused for a reason, but for zero points and p - p, which is 0.
    assert (found.min() >= 0) is np.bool_(expected or name in ('subtract', 'Q with a zero point'))


class Net(nn.Module):
    """Joins of tensors of both kinds, and a residual stage."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = MODELS.build(
            dict(type='QuantResNet', depth=18, base_channels=8, num_stages=2, out_indices=(0, 1),
                 strides=(1, 2), dilations=(1, 1))
        )  # fmt: skip
        self.mixed = QuantConcat()
        self.behind = QuantConv2d(40, 8, 1)
        self.neck = QuantConv2d(8, 8, 1)

    def quant_ties(self):
        return [['mixed._input_quantizer', 'behind._input_quantizer']]

    def forward(self, x):
        one, two = self.backbone(x)
        up = torch.nn.functional.interpolate(two, scale_factor=2, mode='bilinear')
        joined = self.mixed([one, up, self.neck(one), self.neck(one.relu())])
        return self.behind(joined)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('unsigned')
    net, x = Net().eval(), torch.randn(1, 3, 64, 64)
    calibrate(net, [x], 'max')
    for target in ('tensorrt', 'openvino'):
        export_onnx(net, [x], folder / f'{target}.onnx', ['x'], ['y'], target=target)
    return net, x, folder


def grids(model):
    """Scale and dtype of the activations' QuantizeLinear, by name of the node."""
    graph = Graph(model)
    return {
        n.name: (float(graph.constant(n.input[1])), graph.constant(n.input[2]).dtype)
        for n in graph.of('QuantizeLinear')
        if not graph.is_constant(n.input[0])
    }


def test_groups_are_unsigned_all_or_none_with_the_range_in_255_steps(files):
    net, _, folder = files
    signed = grids(onnx.load(folder / 'tensorrt.onnx'))
    model = onnx.load(folder / 'openvino.onnx')
    unsigned, names = grids(model), set(unsigned_names(model))
    assert signed.keys() == unsigned.keys()
    assert {d for _, d in signed.values()} == {np.dtype('int8')}
    assert not unsigned_names(onnx.load(folder / 'tensorrt.onnx'))
    found = 0
    for node, (scale, dtype) in unsigned.items():
        found += dtype == np.uint8
        if dtype == np.int8:
            assert scale == signed[node][0]
        else:
            assert scale == pytest.approx(signed[node][0] * 127 / 255, rel=3e-7)
    assert found > 5
    for group in ties(net):
        assert len(set(group) & names) in (0, len(group))
    # Behind ReLUs: all inputs of convolutions but the image. The sum of a downsampled identity,
    # which may be negative, and the concat with a convolution's output stay signed, and with it
    # the other readers of the stage's output, whose range is the concat's.
    activations = {n for n, q in quantizers(net).items() if q.spec.axis is None}
    assert activations - names == {
        'backbone.conv1._input_quantizer',
        'backbone.layer2.0.residual_quantizer',
        'backbone.layer2.0.conv1._input_quantizer',
        'backbone.layer2.0.downsample.0._input_quantizer',
        'neck._input_quantizer',
        'mixed._input_quantizer',
        'behind._input_quantizer',
    }


def test_a_file_computes_what_the_unsigned_module_computes(files):
    net, x, folder = files
    names = unsigned_names(onnx.load(folder / 'openvino.onnx'))
    with torch.no_grad():
        signed, unsigned = net(x), with_unsigned(net, names)(x)
        with set_mode(net, 'float'):
            exact = net(x)
        copied = with_unsigned(net, names)
        with set_mode(copied, 'float'):
            assert torch.equal(copied(x), exact)
    result = ONNXRuntime(folder / 'openvino.onnx')({'x': x.numpy()})['y']
    assert sqnr(unsigned, result) > sqnr(exact, unsigned) + 10
    assert sqnr(unsigned, result) > sqnr(signed, result) + 10
    assert sqnr(exact, unsigned) > sqnr(exact, signed) + 1  # what it is for


class One(nn.Module):
    """Hands on what is positive, rounded."""

    def __init__(self):
        super().__init__()
        self.conv = QuantConv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.conv.weight)

    def forward(self, x):
        return self.conv(x.relu())


def step_of(net, x, path):
    """Step of the only activation in a net's file for OpenVINO."""
    ((step, dtype),) = grids(export_onnx(net, [x], path, ['x'], ['y'], target='openvino')).values()
    assert dtype == np.uint8
    return step


def test_the_range_is_searched_in_the_steps_of_the_file(tmp_path):
    torch.manual_seed(0)
    net, x = One().eval(), torch.randn(1, 1, 200, 200) ** 3
    calibrate(net, [x])
    values, own = x.relu().numpy().astype(np.float64), float(net.conv._input_quantizer.amax)

    def error(step):
        return ((np.round(values / step).clip(0, 255) * step - values) ** 2).mean()

    step = step_of(net, x, tmp_path / 'm.onnx')
    best = min(error(limit / 255) for limit in np.linspace(own / 2, values.max(), 2000))
    assert error(step) < 1.001 * best < 0.9 * error(own / 255)
    # Also from a checkpoint; and no longer, once the quantizer has another range.
    again = One().eval()
    again.load_state_dict(net.state_dict())
    assert step_of(again, x, tmp_path / 'm.onnx') == pytest.approx(own / 255)
    load_unsigned_ranges(again, unsigned_ranges(net))
    assert step_of(again, x, tmp_path / 'm.onnx') == step
    again.conv._input_quantizer.amax = 2.0
    assert step_of(again, x, tmp_path / 'm.onnx') == pytest.approx(2 / 255)


def test_twice_the_steps_are_6_db(tmp_path):
    net, x = One(), torch.rand(1, 1, 100, 100)
    calibrate(net, [x], 'max')
    found = {}
    for target in ('tensorrt', 'openvino'):
        export_onnx(net, [x], tmp_path / 'm.onnx', ['x'], ['y'], target=target)
        found[target] = sqnr(x, ONNXRuntime(tmp_path / 'm.onnx')({'x': x.numpy()})['y'])
    assert found['openvino'] - found['tensorrt'] == pytest.approx(20 * np.log10(255 / 127), abs=0.3)


def test_the_linter_knows_the_target(files):
    path = files[2] / 'openvino.onnx'
    assert 'Q21' not in {f.rule.id for f in lint(read_graph(path))}
    for_tensorrt = lint(read_graph(path, 'tensorrt'))
    uint8 = [d for _, d in grids(onnx.load(path)).values() if d == np.uint8]
    assert sum(f.rule.id == 'Q21' for f in for_tensorrt) == 2 * len(uint8)  # Q and DQ
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {})
    assert 'Q21' in {f.rule.id for f in lint(Graph(model))}  # foreign files: TensorRT
    assert 'Q21' not in {f.rule.id for f in lint(Graph(model, 'openvino'))}
    with pytest.raises(
        ValueError, match='no target .tvm.; there are tensorrt8, .*openvino, tensorrt'
    ):
        Graph(model, 'tvm')


def test_unsigned_weights_are_a_finding_for_openvino_too(files):
    model = onnx.load(files[2] / 'openvino.onnx')
    q = next(n for n in Graph(model).of('QuantizeLinear') if 'weight' in n.name)
    size = Graph(model).constant(q.input[2]).size
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(size, np.uint8), 'planted'))
    q.input[2] = 'planted'
    assert [f.node for f in lint(Graph(model)) if f.rule.id == 'Q21'] == [q.name]


def test_unknown_targets_and_other_widths_are_refused(tmp_path):
    conv, x = QuantConv2d(3, 4, 1), torch.randn(1, 3, 8, 8)
    calibrate(conv, [x])
    with pytest.raises(ValueError, match='no target .tvm.'):
        export_onnx(conv, [x], tmp_path / 'm.onnx', ['x'], ['y'], target='tvm')
    conv._input_quantizer.spec = QuantSpec(num_bits=4)
    with pytest.raises(
        ValueError, match='only int8 can be exported for .*_input_quantizer has int4'
    ):
        export_onnx(conv, [x], tmp_path / 'm.onnx', ['x'], ['y'])
    assert not list(tmp_path.iterdir())
