"""Names, types and layouts of the file, against what NVIDIA's parser and exporter have."""

import copy
from dataclasses import replace

import onnx
import pytest
import torch
from onnx import AttributeProto, TensorProto

from mmdet3d_quant import fold_bn, quantizers
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.export.sparse import export_lidar, read_program, trace
from mmdet3d_quant.export.sparse.precision import with_precisions
from mmdet3d_quant.export.sparse.program import Add, Program, Relu
from mmdet3d_quant.export.sparse.write import as_onnx
from mmdet3d_quant.layers.sparse import SPARSE_CONVS, QuantMMCVSparseConv3d, QuantMMCVSubMConv3d
from tests.export.sparse.encoders import attributes, build, calibrated

INT, INTS, FLOAT = AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT
FLOATS, STRING = AttributeProto.FLOATS, AttributeProto.STRING
#: Attribute -> type, as `onnx-parser.cpp` reads it: .i(), .ints(), .f(), .floats(), .s().
READ = {
    'SparseConvolution': dict(
        kernel_size=INTS,
        stride=INTS,
        padding=INTS,
        dilation=INTS,
        subm=INT,
        inverse=INT,
        output_bound=INT,
        rulebook=STRING,
        activation=STRING,
        precision=STRING,
        output_precision=STRING,
        weight_dynamic_ranges=FLOATS,
        input_dynamic_range=FLOAT,
    ),
    'Add': dict(
        input0_dynamic_range=FLOAT,
        input1_dynamic_range=FLOAT,
        precision=STRING,
        output_precision=STRING,
    ),
    'Relu': {},
    'ScatterDense': dict(input_spatial_shape=INTS, output_shape=INTS, format=STRING),
    'Transpose': dict(dims=INTS),
    'Reshape': dict(dims=INTS),
}
#: The rest that NVIDIA's exporter writes.
WRITTEN = {
    'SparseConvolution': dict(
        ndim=INT,
        in_channels=INT,
        out_channels=INT,
        input_spatial_shape=INTS,
        output_spatial_shape=INTS,
        input_shape=INTS,
        output_shape=INTS,
        output_padding=INTS,
        groups=INT,
        transposed=INT,
    )
}
RANGES = {n for types in READ.values() for n in types if 'dynamic' in n}
orders = pytest.mark.parametrize('order', ['xyz', 'zyx'])
precisions = pytest.mark.parametrize('quantized', [False, True])


def made(order, quantized):
    return as_onnx(trace(calibrated('bevfusion'), order, quantized))


@orders
@precisions
def test_attributes(order, quantized):
    for node in made(order, quantized).graph.node:
        types = {**READ[node.op_type], **WRITTEN.get(node.op_type, {})}
        found = {a.name: a.type for a in node.attribute}
        optional = set() if quantized and node.name != 'conv0' else RANGES
        missing = set(types) - set(found) - optional
        assert not missing and found == {n: types[n] for n in found}, node.name
        if node.op_type == 'SparseConvolution' and quantized:
            assert len(attributes(node)['weight_dynamic_ranges']) == node_channels(node)
        if not quantized:
            assert not RANGES & set(found) and b'int8' not in attributes(node).values()


def node_channels(node):
    return attributes(node)['out_channels']


@orders
def test_input_output_and_versions(order):
    model = made(order, True)
    (x,), (y,) = model.graph.input, model.graph.output
    for value, shape in ((x, [1, 5]), (y, [1, 32, 12, 10])):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT16
        assert [d.dim_value for d in value.type.tensor_type.shape.dim] == shape
    assert x.name == '0' and y.name == model.graph.node[-1].output[0]
    assert [(o.domain, o.version) for o in model.opset_import] == [('ai.onnx', 11)]
    assert model.ir_version == 8 and model.graph.name == 'scn'


def test_nodes_are_numbered_as_in_a_published_trace():
    """The log that NVIDIA's exporter prints for BEVFusion, of the issues of its repository."""
    graph = made('xyz', True).graph
    found = [(n.name, [i for i in n.input if 'spconv' not in i], *n.output) for n in graph.node]
    assert found[:11] == [
        ('conv0', ['0'], '1'),
        ('conv1', ['1'], '2'),
        ('conv2', ['2'], '3'),
        ('add0', ['3', '1'], '4'),
        ('relu0', ['4'], '5'),
        ('conv3', ['5'], '6'),
        ('conv4', ['6'], '7'),
        ('add1', ['7', '5'], '8'),
        ('relu1', ['8'], '9'),
        ('conv5', ['9'], '10'),
        ('conv6', ['10'], '11'),
    ]
    assert [n.name for n in graph.node][-4:] == ['conv13', 'scatter0', 'transpose0', 'reshape0']
    made_before = {'0', *(i.name for i in graph.initializer)}
    for node in graph.node:
        assert set(node.input) <= made_before
        made_before.update(node.output)


@orders
def test_initializers(order):
    graph = made(order, False).graph
    weights = {i.name: i for i in graph.initializer}
    for i, node in enumerate(n for n in graph.node if n.op_type == 'SparseConvolution'):
        a = attributes(node)
        assert list(node.input[1:]) == [f'spconv{i}.weight', f'spconv{i}.bias']
        weight, bias = (weights.pop(name) for name in node.input[1:])
        assert list(weight.dims) == [a['out_channels'], *a['kernel_size'], a['in_channels']]
        assert list(bias.dims) == [a['out_channels']]
        for tensor in (weight, bias):
            assert tensor.data_type == TensorProto.FLOAT16
            assert len(tensor.raw_data) == 2 * torch.Size(tensor.dims).numel()
    assert not weights


def test_weights_and_axes_of_both_orders():
    model = fold_bn(build('bevfusion'))
    xyz, zyx = trace(model, 'xyz'), trace(model, 'zyx')
    assert (xyz.order, zyx.order) == ('xyz', 'zyx')
    assert xyz.grid == (48, 40, 21) and zyx.grid == (21, 40, 48)
    for a, b in strict_zip(xyz.convs, zyx.convs):
        conv = model.get_submodule(a.layer)
        assert torch.equal(a.weight, conv.weight.half())
        assert torch.equal(b.weight, conv.weight.permute(0, 3, 2, 1, 4).half())
        assert a.stride == tuple(conv.stride) and b.stride == a.stride[::-1]
        assert b.padding == a.padding[::-1] and b.output_grid == a.output_grid[::-1]
    assert xyz.convs[-1].kernel == (1, 1, 3) and zyx.convs[-1].kernel == (3, 1, 1)
    # the only two transpositions that libspconv fuses
    assert [n.dims for n in (xyz.ops[-2], zyx.ops[-2])] == [(0, 1, 4, 2, 3), (0, 1, 2, 4, 3)]


def test_height_first_encoders_need_no_transposition():
    program = trace(build('second'))
    assert program.order == 'zyx' and program.grid == (41, 40, 48)
    assert [type(op).__name__ for op in program.ops[-2:]] == ['ScatterDense', 'Reshape']
    assert program.output_shape == (1, 32, 5, 6)


def test_layers_of_a_stage_share_their_rules():
    """The names of NVIDIA's exporter for BEVFusion; mmdet3d's blocks have no `indice_key`."""
    names = [op.rulebook for op in trace(build('bevfusion')).convs]
    assert names == [
        *('subm1',) * 5, 'spconv1', *('subm2',) * 2, 'spconv2', *('subm3',) * 4, 'spconv_down2'
    ]  # fmt: skip


def test_relus_follow_only_adds():
    program = trace(build('bevfusion'))
    for op in program.convs:
        assert op.relu == (not op.layer.endswith('.conv2'))
    kinds = [type(op).__name__ for op in program.ops]
    assert all(kinds[i - 1] == 'Add' for i, kind in enumerate(kinds) if kind == 'Relu')


@orders
def test_precisions_are_those_of_nvidias_exporter(order):
    for op in trace(calibrated('bevfusion'), order).ops:
        if not hasattr(op, 'precision'):
            continue
        wanted = ('fp16' if op.layer == 'conv_input.0' else 'int8',
                  'fp16' if op.layer == 'conv_out.0' else 'int8')  # fmt: skip
        assert (op.precision, op.output_precision) == wanted, op.layer


def test_precisions_with_the_first_block_in_fp16():
    """Those that NVIDIA's exporter sets by hand for CenterPoint."""
    skip = ['conv_input', 'encoder_layers.encoder_layer1.0']
    program = trace(calibrated('bevfusion', skip=skip))
    found = [(op.precision, op.output_precision) for op in program.ops if hasattr(op, 'precision')]
    assert found[:5] == [*[('fp16', 'fp16')] * 3, ('fp16', 'int8'), ('int8', 'int8')]


def test_fp16_readers_leave_the_scale_of_a_tensor_alone():
    """libspconv takes the scale of a tensor from whoever reads it."""
    first = trace(calibrated('bevfusion')).convs[1]
    made = [
        replace(first, name='a', inputs=('0',), output='1', input_range=None),
        replace(first, name='b', inputs=('1',), output='2', input_range=None),
        replace(first, name='c', inputs=('1',), output='3', input_range=2.0),
        Add('d', ('3', '1'), '4', (2.0, 2.0)),
        Relu('e', ('4',), '5'),
        replace(first, name='f', inputs=('5',), output='6', input_range=3.0),
    ]
    program = with_precisions(Program(tuple(made), 8, '6', (1,)))
    a, b, c, d, _, f = program.ops
    found = [(op.precision, op.output_precision) for op in (a, b, c, d, f)]
    assert found == [
        ('fp16', 'fp16'),
        ('fp16', 'fp16'),
        ('int8', 'fp16'),  # read by an add that is FP16, because b wants tensor 1 in FP16
        ('fp16', 'int8'),
        ('int8', 'fp16'),
    ]
    assert (a.input_range, b.input_range, c.input_range) == (None, 2.0, 2.0)
    assert d.ranges == (None, 2.0)


@orders
def test_ranges_are_those_of_the_folded_quantizers(order):
    model = calibrated('bevfusion')
    program = trace(model, order)
    found = quantizers(fold_bn(model))
    for op in program.convs[1:]:
        assert op.input_range == found[f'{op.layer}._input_quantizer'].amax.item()
        amax = found[f'{op.layer}._weight_quantizer'].amax.flatten()
        assert op.weight_ranges == tuple(amax.tolist())
    adds = [op for op in program.ops if type(op).__name__ == 'Add']
    assert all(op.ranges[0] == found[f'{op.layer}._input_quantizer'].amax.item() for op in adds)
    # The first convolution is float: its weight has a range all the same, its input has none.
    first = program.convs[0]
    largest = model.conv_input[0].weight.abs().amax((1, 2, 3, 4))
    assert first.input_range is None and first.weight_ranges == tuple(largest.tolist())


def test_file_comes_back_as_the_program_that_was_written(tmp_path):
    model = calibrated('bevfusion')
    export_lidar(model, tmp_path / 'lidar.onnx', 'zyx')
    wanted, found = trace(model, 'zyx'), read_program(tmp_path / 'lidar.onnx')
    for a, b in strict_zip(wanted.ops, found.ops):
        assert type(a) is type(b)
        for name, value in vars(a).items():
            other = getattr(b, name)
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name
    assert (wanted.output, wanted.output_shape, wanted.channels) == (
        found.output, found.output_shape, found.channels
    )  # fmt: skip


def with_mmcvs_layers(model):
    """A copy whose convolutions are mmcv's, with weights in the layout (kernel, in, out)."""
    model = copy.deepcopy(model)
    for name, conv in list(model.named_modules()):
        if not isinstance(conv, SPARSE_CONVS):
            continue
        kind = QuantMMCVSubMConv3d if conv.subm else QuantMMCVSparseConv3d
        names = ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'indice_key')
        other = kind(**{n: getattr(conv, n) for n in names}, bias=False)
        other.weight.data = conv.weight.data.permute(1, 2, 3, 4, 0).contiguous()
        for which in ('_input_quantizer', '_weight_quantizer'):
            old, new = getattr(conv, which), getattr(other, which)
            if old.float_reason is None:
                new.amax = old.amax.flatten()
            else:
                new.keep_float(old.float_reason)
        parent, _, child = name.rpartition('.')
        model.get_submodule(parent)._modules[child] = other
    return model


@precisions
def test_mmcvs_layers_give_the_same_file(quantized):
    model = calibrated('bevfusion')
    a, b = (as_onnx(trace(m, quantized=quantized)) for m in (model, with_mmcvs_layers(model)))
    assert a.SerializeToString() == b.SerializeToString()


def test_description_for_the_manifest(tmp_path):
    entry = export_lidar(calibrated('bevfusion'), tmp_path / 'lidar.onnx', 'zyx')
    assert entry['order'] == 'zyx' and entry['grid'] == [21, 40, 48] and entry['opset'] == 11
    assert entry['inputs']['0'] == dict(shape=[1, 5], dtype='float16')
    assert entry['nodes']['SparseConvolution'] == 14
    first = entry['layers'][0]
    assert first['layer'] == 'conv_input.0' and first['kernel'] == [8, 3, 3, 3, 5]
    assert onnx.load(tmp_path / 'lidar.onnx').graph.node[0].doc_string == 'conv_input.0'
