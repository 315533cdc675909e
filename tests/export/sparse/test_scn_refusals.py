"""What cannot be exported or read says so, and where."""

import copy
from dataclasses import replace

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mmdet3d_quant import UncalibratedError, quantizers
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.export import ExportError
from mmdet3d_quant.export.sparse import ScnError, export_lidar, read_program, trace, write_program
from mmdet3d_quant.export.sparse.read import from_onnx
from mmdet3d_quant.export.sparse.run import ScnNetwork
from mmdet3d_quant.export.sparse.write import as_onnx
from mmdet3d_quant.parents import BEVFusionSparseEncoder
from tests.export.sparse.encoders import BEVFUSION, build, calibrated, cloud


@pytest.fixture(scope='module')
def model():
    return calibrated('bevfusion')


@pytest.fixture(scope='module')
def content(model):
    """Bytes of a file."""
    return as_onnx(trace(model)).SerializeToString()


def test_exporting_keeps_no_state(model, tmp_path):
    other = build('second')
    before = copy.deepcopy(model.state_dict())
    paths = [tmp_path / f'{i}.onnx' for i in range(4)]
    for path, what in strict_zip(paths, (model, other, model, other)):
        export_lidar(what, path)
    first, second, third, fourth = (path.read_bytes() for path in paths)
    assert first == third and second == fourth and first != second
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[n], after[n]) for n in before)
    norms = sum(isinstance(m, nn.BatchNorm1d) for m in model.modules())
    assert norms == 14 and not model._forward_hooks


def test_encoder_in_training_mode_stays_in_it(content):
    model = calibrated('bevfusion').train()
    assert as_onnx(trace(model)).SerializeToString() == content and model.training


# What libspconv does not have


class Other(BEVFusionSparseEncoder):
    def forward(self, voxel_features, coors, batch_size):
        return super().forward(2 * voxel_features, coors, batch_size)


def leaky(model):
    model.encoder_layers.encoder_layer1[2]._modules['2'] = nn.LeakyReLU()


def norm_first(model):
    stage = model.encoder_layers.encoder_layer1[2]
    conv, norm, relu = stage.children()
    stage._modules.update({'0': norm, '1': relu, '2': conv})


def grouped(model):
    model.conv_out[0].groups = 2


def pointwise(model):
    conv = model.conv_out[0]
    conv.kernel_size = [1, 1, 1]
    conv.weight = nn.Parameter(conv.weight[:, :, :, :1])


def huge(model):
    model.encoder_layers.encoder_layer2[0].conv2.weight.data[3] *= 1e8


def no_statistics(model):
    norm = model.encoder_layers.encoder_layer2[0].norm1
    norm.running_mean = norm.running_var = None


def hooked(model):
    model.encoder_layers.encoder_layer2[0].conv1.register_forward_hook(lambda m, i, o: o)


def hooked_before(model):
    model.conv_out.register_forward_pre_hook(lambda m, i: i)


def put_in(model):
    conv = model.encoder_layers.encoder_layer1[0].conv2
    conv.forward = conv.forward


def other_block(model):
    block = model.encoder_layers.encoder_layer3[1]
    block.__class__ = type('MyBlock', (type(block),), dict(forward=lambda self, x: x))


@pytest.mark.parametrize(
    ('spoil', 'says'),
    [
        (leaky, r'encoder_layers\.encoder_layer1\.2\.2 is a LeakyReLU'),
        (norm_first, r'encoder_layer1\.2\.0 is a BatchNorm1d that cannot be folded: what it reads'),
        (no_statistics, r'encoder_layer2\.0\.bn1 is.*folded: .*train it with track_running_stats'),
        (grouped, r'conv_out\.0 .*groups; train it without'),
        (pointwise, r'conv\d+ \(conv_out\.0\).*1x1x1.*3x3x3 that is zero but for its centre'),
        (
            huge,
            r'encoder_layers\.encoder_layer2\.0\.conv2\.weight.*channel 3;.*65504.*weight decay',
        ),
        (hooked, r'encoder_layers\.encoder_layer2\.0\.conv1 has forward hooks.*remove'),
        (hooked_before, r'conv_out has forward hooks'),
        (put_in, r'encoder_layers\.encoder_layer1\.0\.conv2 has .*another forward put in'),
        (other_block, r'encoder_layers\.encoder_layer3\.1 computes what MyBlock\.forward'),
    ],
)
def test_unsupported_layers_are_named(spoil, says, tmp_path):
    model = build('bevfusion')
    spoil(model)
    with pytest.raises((ExportError, ScnError), match=says):
        export_lidar(model, tmp_path / 'lidar.onnx')
    assert not list(tmp_path.iterdir())


def test_another_forward_is_another_network():
    with pytest.raises(ExportError, match=r'Other computes what Other\.forward says'):
        trace(Other(**BEVFUSION))
    with pytest.raises(ExportError, match='Linear'):
        trace(nn.Linear(2, 2))


def test_order_that_libspconv_cannot_scatter():
    with pytest.raises(ExportError, match='axes in the order zyx'):
        trace(build('second'), 'xyz')
    with pytest.raises(ExportError, match="'yzx'"):
        trace(build('bevfusion'), 'yzx')


def test_uncalibrated_quantizers_are_named(tmp_path):
    with pytest.raises(UncalibratedError, match=r'encoder_layer1\.0\.conv1\._input_quantizer'):
        export_lidar(build('bevfusion', True), tmp_path / 'lidar.onnx')
    assert not list(tmp_path.iterdir())


def test_readers_of_one_tensor_need_one_range():
    model = calibrated('bevfusion')
    name = 'encoder_layers.encoder_layer1.1.conv1._input_quantizer'
    quantizers(model)[name].amax = 1.25
    with pytest.raises(
        ExportError, match=r'encoder_layer1\.1\.conv1.*encoder_layer1\.1\.add.*1\.25'
    ):
        trace(model)


def test_one_quantizer_alone_is_refused():
    model = calibrated('bevfusion')
    model.conv_out[0]._weight_quantizer.keep_float('test')
    with pytest.raises(ExportError, match=r'conv_out\.0 quantizes only one'):
        trace(model)


# Files


def test_missing_file(tmp_path):
    with pytest.raises(ScnError, match=r'no\.onnx does not exist'):
        read_program(tmp_path / 'no.onnx')


def test_truncated_files(content, tmp_path):
    path = tmp_path / 'lidar.onnx'
    size = len(content)
    for end in (0, 1, 7, 100, *range(size // 20, size, size // 20), size - 40, size - 1):
        path.write_bytes(content[:end])
        with pytest.raises(ScnError, match=r'lidar\.onnx'):
            read_program(path)


def test_files_of_another_kind(tmp_path):
    path = tmp_path / 'other.onnx'
    path.write_bytes(b'a PNG or a checkpoint' * 50)
    with pytest.raises(ScnError, match='truncated, or no ONNX file'):
        read_program(path)
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in 'xy']
    graph = helper.make_graph([helper.make_node('Exp', ['x'], ['y'])], 'g', value[:1], value[1:])
    onnx.save(helper.make_model(graph), str(path))
    with pytest.raises(ScnError, match='no SparseConvolution.*Exp'):
        read_program(path)


def to_float32(model):
    w = model.graph.initializer[0]
    w.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(w).astype('f4'), w.name))


def add_softmax(model):
    model.graph.node[-1].op_type = 'Softmax'


def drop_bias(model):
    del model.graph.node[2].input[2]


def drop_weight(model):
    del model.graph.initializer[2]


def text_stride(model):
    attribute(model.graph.node[1], 'stride').CopyFrom(helper.make_attribute('stride', 'two'))


def no_grid(model):
    attribute(model.graph.node[1], 'input_spatial_shape').name = 'x'


def sigmoid(model):
    attribute(model.graph.node[1], 'activation').s = b'Sigmoid'


def inverse(model):
    attribute(model.graph.node[1], 'inverse').i = 1


def shared_rules(model):
    attribute(model.graph.node[-4], 'rulebook').s = b'subm1'


def few_ranges(model):
    del attribute(model.graph.node[1], 'weight_dynamic_ranges').floats[0]


def no_range(model):
    attribute(model.graph.node[1], 'input_dynamic_range').f = float('nan')


def other_grid(model):
    attribute(model.graph.node[0], 'output_spatial_shape').ints[0] += 1


def other_dims(model):
    attribute(model.graph.node[-2], 'dims').ints[:] = [0, 1, 3, 2, 4]


def later_tensor(model):
    model.graph.node[1].input[0] = '9'


def short_raw(model):
    w = model.graph.initializer[0]
    w.raw_data = w.raw_data[:-2]


def attribute(node, name):
    return next(a for a in node.attribute if a.name == name)


@pytest.mark.parametrize(
    ('spoil', 'says'),
    [
        (to_float32, r"conv0.*'spconv0\.weight' is FLOAT,.*FLOAT16"),
        (add_softmax, 'does not have Softmax'),
        (drop_bias, r'conv2: 2 inputs, expected 3'),
        (drop_weight, r"conv1.*'spconv1\.weight' is missing"),
        (text_stride, r'conv1: attribute stride is STRING, expected INTS'),
        (no_grid, r'conv1: attribute input_spatial_shape is missing'),
        (sigmoid, r'conv1: activation Sigmoid'),
        (inverse, r'conv1: inverse'),
        (shared_rules, r"conv13 .*rulebook 'subm1'"),
        (few_ranges, r'conv1 .*7 weight ranges for 8'),
        (no_range, r'conv1 .*finite and positive'),
        (other_grid, r'conv0 .*output_spatial_shape'),
        (other_dims, r'transpose0: .*no transposition \(0, 1, 3, 2, 4\)'),
        (later_tensor, r"conv1 reads tensor '9'"),
        (short_raw, r'conv0.*bytes for a shape'),
    ],
)
def test_spoiled_files_are_refused(content, spoil, says):
    model = onnx.load_from_string(content)
    from_onnx(model)
    spoil(model)
    with pytest.raises(ScnError, match=says):
        from_onnx(model)


def test_writer_checks_before_it_writes(model, tmp_path):
    program = trace(model)
    spoiled = replace(program, ops=(replace(program.ops[0], grid=(1, 2, 3)), *program.ops[1:]))
    with pytest.raises(ScnError, match='conv1|conv0'):
        write_program(spoiled, tmp_path / 'lidar.onnx')
    assert not list(tmp_path.iterdir())


# Voxels


@pytest.mark.parametrize(
    ('spoil', 'says'),
    [
        (lambda f, c: (f[:, :4], c), r'expects \(N, 5\)'),
        (lambda f, c: (f, c[:-1]), 'coordinates of shape'),
        (lambda f, c: (f, c + 40), 'outside of one frame'),
        (lambda f, c: (f, c.index_fill(1, torch.tensor(0), 1)), 'outside of one frame'),
        (lambda f, c: (f, c[torch.zeros(len(c)).long()]), 'same coordinates'),
    ],
)
def test_voxels_that_do_not_fit(model, spoil, says):
    with pytest.raises(ScnError, match=says):
        ScnNetwork(trace(model))(*spoil(*cloud(model)))
