"""Opsets, batch sizes, how weights are stored, the runtime's layer norm: the same numbers."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.check.lint import layers, lint, read_graph
from mmdet3d_quant.check.lint.layers import coverage
from mmdet3d_quant.check.probes import points_of, torch_points
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines import ONNXRuntime
from mmdet3d_quant.export import Cut, ExportError, export_onnx
from mmdet3d_quant.export.cuts import Head
from mmdet3d_quant.export.passes import sort_nodes
from mmdet3d_quant.export.targets import target_in
from mmdet3d_quant.layers import QuantConcat, QuantConv2d, QuantConvTranspose2d
from mmdet3d_quant.runs import from_config as fc
from tests.small import ROOT

TINY = 'bevfusion_tiny_lidar-cam_synthetic'
OUTPUTS = ('score', 'rot', 'dim', 'reg', 'height', 'vel')


class Net(nn.Module):
    """Every quantized layer, groups, ties, a layer norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(QuantConv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.grouped = QuantConv2d(8, 8, 3, padding=1, groups=2)
        self.concat = QuantConcat()
        self.up = QuantConvTranspose2d(16, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        x = self.first(x)
        x = self.up(self.concat([x, self.grouped(x).relu()])).relu()
        return self.norm(x.flatten(2).transpose(1, 2))


@pytest.fixture(scope='module')
def net():
    net, x = Net().eval(), torch.randn(1, 3, 12, 16)
    calibrate(net, [x], 'max')
    return net, x


def export(net, path, **options):
    module, x = net
    return export_onnx(module, [x], path, ['x'], ['y'], **options)


def result(path, x):
    return ONNXRuntime(path)({'x': x.numpy()})['y']


@pytest.mark.parametrize('opset', [13, 16, 18, 19, 21])
def test_every_opset_gives_the_numbers_of_17(opset, net, tmp_path):
    export(net, tmp_path / '17.onnx')
    model = export(net, tmp_path / 'm.onnx', opset_version=opset)
    assert model.opset_import[0].version == opset
    # The layer norm of opsets before 17 is made of others, which round otherwise.
    found, expected = (result(tmp_path / f'{n}.onnx', net[1]) for n in ('m', '17'))
    assert sqnr(expected, found) > 110
    kinds = {n.op_type for n in model.graph.node}
    assert ('LayerNormalization' in kinds) is (opset >= 17)
    assert target_in(model) == 'tensorrt'
    points = list(torch_points(Cut('net', net[0], dict(x=net[1]), ('y',)), 'quant'))
    assert sorted(points_of(model, points).values()) == sorted(points)
    graph = read_graph(tmp_path / 'm.onnx')
    # TensorRT 8.6, which the target means, is known to read opsets up to 17.
    assert [f.rule.id for f in lint(graph)] == ['Q40'] * (opset > 17)
    assert coverage(layers(graph)) == 1


def test_opsets_in_openvino(net, tmp_path):
    """Float, where its arithmetic depends on no INT8 instructions."""
    ov = pytest.importorskip('openvino')
    for opset in (13, 17, 21):
        export(net, tmp_path / 'm.onnx', opset_version=opset, quantized=False)
        core = ov.Core()
        compiled = core.compile_model(
            core.read_model(tmp_path / 'm.onnx'), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'}
        )
        found = compiled({'x': net[1].numpy()})[0]
        assert sqnr(result(tmp_path / 'm.onnx', net[1]), found) > 100


@pytest.mark.parametrize('target', ['tensorrt', 'openvino'])
def test_int8_weights_give_equal_bits_in_a_quarter_of_the_size(target, net, tmp_path):
    net = copy.deepcopy(net[0]), net[1]
    with torch.no_grad():  # weights half-way between two steps: rounded as ONNX does, to even
        conv = net[0].grouped
        conv.weight[0] = 0.5 * conv._weight_quantizer._amax[0] / 127
        conv.weight[1] = -1.5 * conv._weight_quantizer._amax[1] / 127
    qdq = export(net, tmp_path / 'qdq.onnx', target=target)
    dq = export(net, tmp_path / 'dq.onnx', target=target, weights='int8')
    x = torch.randn(1, 3, 12, 16) * 2
    assert np.array_equal(result(tmp_path / 'qdq.onnx', x), result(tmp_path / 'dq.onnx', x))

    def stored(model):
        weights = [numpy_helper.to_array(i) for i in model.graph.initializer if len(i.dims) == 4]
        return sum(w.nbytes for w in weights), {w.dtype for w in weights}

    assert stored(dq) == (stored(qdq)[0] // 4, {np.dtype('int8')})
    graph = read_graph(tmp_path / 'dq.onnx')
    assert lint(graph) == [] and coverage(layers(graph)) == 1
    before = layers(read_graph(tmp_path / 'qdq.onnx'))
    assert [layer.macs for layer in layers(graph)] == [layer.macs for layer in before]


def test_any_batch_size(net, tmp_path):
    model = export(net, tmp_path / 'm.onnx', dynamic_batch=True)
    dims = [v.type.tensor_type.shape.dim for v in (model.graph.input[0], model.graph.output[0])]
    assert all(d[0].dim_param and not d[0].dim_value for d in dims)
    assert [d.dim_value for d in dims[1][1:]] == [24 * 32, 6]
    x = torch.randn(3, 3, 12, 16)
    each = np.concatenate([result(tmp_path / 'm.onnx', x[i : i + 1]) for i in range(3)])
    assert np.allclose(result(tmp_path / 'm.onnx', x), each, atol=1e-5)


def test_a_part_that_fixes_its_batch_is_an_error(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(1, -1).relu()

    class Joined(nn.Module):
        def forward(self, x):
            return torch.cat([x, torch.ones(1, 4)], 0)

    for module in (Fixed(), Joined()):
        with pytest.raises(ExportError, match='does not take two samples'):
            export_onnx(
                module, [torch.ones(1, 4)], tmp_path / 'm.onnx', ['x'], ['y'], dynamic_batch=True
            )
    assert not list(tmp_path.iterdir())


def test_half_weights(net, tmp_path):
    single = export(net, tmp_path / 'single.onnx', quantized=False)
    half = export(net, tmp_path / 'half.onnx', quantized=False, fp16=True)
    weights = [i for i in half.graph.initializer if len(i.dims) == 4]
    assert len(weights) == 3 and all(i.data_type == onnx.TensorProto.FLOAT16 for i in weights)
    for a, b in strict_zip(single.graph.input, half.graph.input):
        assert a.type.tensor_type.elem_type == b.type.tensor_type.elem_type
    found = result(tmp_path / 'half.onnx', net[1])
    assert 50 < sqnr(result(tmp_path / 'single.onnx', net[1]), found) < 90  # FP16's 11 bits
    with pytest.raises(ValueError, match='without Q/DQ, and first.0._input_quantizer is quantized'):
        export(net, tmp_path / 'm.onnx', fp16=True)


def test_nodes_are_sorted():
    nodes = [onnx.helper.make_node('Relu', [a], [b]) for a, b in ('cd', 'bc', 'ab')]
    graph = onnx.helper.make_graph(nodes, 'g', [], [])
    sort_nodes(graph)
    assert [n.input[0] for n in graph.node] == ['a', 'b', 'c']


def test_shapes_are_constants_where_sizes_are_fixed(tmp_path, monkeypatch):
    class Shaped(nn.Module):
        def forward(self, x):
            y = x.unflatten(1, (2, -1)).flatten(0, 1)
            y = y.reshape(x.shape[0], -1, x.shape[2] * x.shape[3])
            return y + torch.arange(y.shape[2]).expand(y.shape[1], -1) // 3

    x = torch.randn(1, 6, 4, 5)
    kinds = {}
    for name in ('folded', 'free', 'plain'):
        if name == 'plain':
            monkeypatch.setattr('mmdet3d_quant.export.onnx.fold_shapes', lambda model: None)
        dynamic = dict(dynamic_batch=name == 'free')
        model = export_onnx(Shaped(), [x], tmp_path / f'{name}.onnx', ['x'], ['y'], **dynamic)
        kinds[name] = {n.op_type for n in model.graph.node} - {'Constant'}
        assert np.array_equal(result(tmp_path / f'{name}.onnx', x), Shaped()(x).numpy())
    computing = {'Shape', 'Gather', 'Slice', 'Concat', 'Unsqueeze', 'Range'}
    assert not kinds['folded'] & computing
    assert kinds['plain'] & computing and kinds['free'] & computing


@pytest.mark.parametrize('opset', [13, 17])
def test_the_custom_layer_norm_is_that_of_the_runtime_and_nothing_else_changes(
    opset, net, tmp_path
):
    """Name, domain, inputs and attributes as CUDA-BEVFusion's plugin creator reads them."""
    model = export(net, tmp_path / 'm.onnx', layernorm='custom', opset_version=opset)
    (node,) = (n for n in model.graph.node if n.domain == 'nv')
    assert node.op_type == 'CustomLayerNormalization'
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert set(attributes) == {'epsilon', 'axis'}
    assert attributes['axis'] == -1 and attributes['epsilon'] == pytest.approx(1e-5)
    assert len(node.input) == 3 and lint(read_graph(tmp_path / 'm.onnx')) == []
    if opset == 17:  # put ONNX's own in its place
        node.op_type, node.domain = 'LayerNormalization', ''
        onnx.save(model, tmp_path / 'back.onnx')
        export(net, tmp_path / 'standard.onnx')
        found, expected = (result(tmp_path / f'{n}.onnx', net[1]) for n in ('back', 'standard'))
        assert np.array_equal(found, expected)


@pytest.fixture(scope='module')
def head():
    model = fc.build_model(fc.read_config(ROOT / f'configs/bevfusion_tiny/{TINY}.py'))
    fc.load_weights(model, ROOT / f'checkpoints/{TINY}.pth', calibrated=False)
    torch.manual_seed(0)
    return Head(model.eval()), torch.randn(2, 96, 72, 72).relu()


def test_the_head_takes_the_highest_scores_without_sorting_and_scattering(head, tmp_path):
    module, maps = head
    model = export_onnx(module, [maps[:1]], tmp_path / 'm.onnx', ['middle'], OUTPUTS)
    kinds = [n.op_type for n in model.graph.node]
    assert kinds.count('TopK') == 1
    assert not {'ScatterND', 'ScatterElements', 'NonZero', 'Loop', 'If'} & set(kinds)
    graph = read_graph(tmp_path / 'm.onnx')
    (topk,) = graph.of('TopK')
    (count,) = graph.constant(topk.input[1]).reshape(-1)
    assert count == module.bbox_head.num_proposals
    model = export_onnx(
        module, [maps[:1]], tmp_path / 'm.onnx', ['middle'], OUTPUTS, layernorm='custom'
    )
    kinds = [n.op_type for n in model.graph.node]
    assert kinds.count('CustomLayerNormalization') == 3 and 'LayerNormalization' not in kinds


def test_the_head_takes_several_samples(head, tmp_path):
    module, maps = head
    options = dict(dynamic_batch=True)
    export_onnx(module, [maps[:1]], tmp_path / 'm.onnx', ['middle'], OUTPUTS, **options)
    engine = ONNXRuntime(tmp_path / 'm.onnx')
    found = engine(dict(middle=maps.numpy()))
    with torch.no_grad():
        expected = dict(strict_zip(OUTPUTS, module(maps)))
    for name, value in expected.items():
        assert sqnr(value, found[name]) > 60, name


def test_arguments_are_checked_before_anything_is_written(net, tmp_path, monkeypatch):
    path = tmp_path / 'm.onnx'
    for options, message in (
        (dict(opset_version=12), 'must be 13 .* to 21, not 12'),
        (dict(opset_version=22), 'must be 13 .* to 21, not 22'),
        (dict(weights='int4'), "weights must be float or int8, not 'int4'"),
        (dict(layernorm='fast'), "layernorm must be standard or custom, not 'fast'"),
        (dict(layernorm='custom', opset_version=18), 'goes up to opset 17, not 18'),
    ):
        with pytest.raises(ValueError, match=message):
            export(net, path, **options)
    monkeypatch.setattr('mmdet3d_quant.export.onnx.LARGEST', 1000)
    with pytest.raises(ExportError, match='the weights of Net take .* GiB; .* export it in parts'):
        export(net, path)
    assert not list(tmp_path.iterdir())
