"""What a file for libspconv computes: against torch, and against dense convolutions."""

import math
from dataclasses import replace

import onnx
import pytest
import torch
from mmdet3d.models.middle_encoders import SparseEncoder
from onnx import helper

from mmdet3d_quant import quantizers, set_mode
from mmdet3d_quant.check.sparse import verify_lidar
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.export.sparse import export_lidar, read_program, trace
from mmdet3d_quant.export.sparse.read import from_onnx
from mmdet3d_quant.export.sparse.run import ScnNetwork
from mmdet3d_quant.export.sparse.write import as_onnx
from tests.export.sparse.encoders import (
    SECOND,
    build,
    calibrated,
    cloud,
    enliven,
    interpret,
    turned,
    with_half_weights,
)

CASES = [('bevfusion', 'xyz'), ('bevfusion', 'zyx'), ('second', 'zyx')]
NATIVE = {'bevfusion': 'xyz', 'second': 'zyx'}
cases = pytest.mark.parametrize(('kind', 'order'), CASES)


def exported(model, path, kind, order, **kwargs):
    """The file's voxels and map, and the encoder's: (network, voxels, map of the encoder)."""
    export_lidar(model, path, order, **kwargs)
    feats, coors = cloud(model)
    with torch.no_grad():
        wanted = model(feats, coors, 1)
    return (feats, coors if order == NATIVE[kind] else turned(coors)), wanted


@cases
def test_float_file_computes_the_encoder(kind, order, tmp_path):
    path = tmp_path / 'lidar.onnx'
    voxels, wanted = exported(build(kind), path, kind, order)
    program = read_program(path)
    assert wanted.std() > 0.05
    assert sqnr(wanted, ScnNetwork(program)(*voxels)) > 60
    assert sqnr(wanted, ScnNetwork(program, fp16_tensors=True)(*voxels)) > 50


def test_convolution_without_norm_or_bias(tmp_path):
    """The parser wants a bias of every convolution."""
    model = build('bevfusion', order=('norm', 'act', 'conv'))
    voxels, wanted = exported(model, tmp_path / 'lidar.onnx', 'bevfusion', 'xyz')
    program = read_program(tmp_path / 'lidar.onnx')
    assert program.convs[0].bias.eq(0).all() and not program.convs[0].relu
    assert sqnr(wanted, ScnNetwork(program)(*voxels)) > 60


@cases
@pytest.mark.parametrize('quantized', [False, True])
def test_reader_agrees_with_dense_convolutions(kind, order, quantized, tmp_path):
    path = tmp_path / 'lidar.onnx'
    model = calibrated(kind) if quantized else build(kind)
    voxels, _ = exported(model, path, kind, order)
    out = ScnNetwork(read_program(path), dtype=torch.float64)(*voxels)
    assert sqnr(interpret(onnx.load(path), *voxels), out) > 200


@cases
def test_int8_file_is_the_fake_quant_encoder(kind, order, tmp_path):
    """Exactly: batch norm folded and weights FP16 on both sides, the rest is arithmetic.

    The order of the sums is the same only if that of the axes is; in float64 no rounding of
    one is a rounding to another step.
    """
    path = tmp_path / 'lidar.onnx'
    model = calibrated(kind)
    voxels, wanted = exported(model, path, kind, order)
    with set_mode(model, 'float'), torch.no_grad():
        assert 10 < sqnr(model(*cloud(model), 1), wanted) < 60  # quantization does something
    reference = with_half_weights(model)
    if order == NATIVE[kind]:
        with torch.no_grad():
            same = reference(*cloud(model), 1)
        assert torch.equal(ScnNetwork(read_program(path))(*voxels), same)
    feats, coors = cloud(model)
    with torch.no_grad():
        exact = reference.double()(feats.double(), coors, 1)
    out = ScnNetwork(read_program(path), dtype=torch.float64)(feats.double(), voxels[1])
    assert sqnr(exact, out) > 200
    # FP16 weights move a few of them to the next step: next to what quantization costs, little.
    assert sqnr(wanted, ScnNetwork(read_program(path))(*voxels)) > 30


def test_first_block_in_fp16_as_in_nvidias_centerpoint(tmp_path):
    """Layers that are skipped are computed in FP16, and the add with them."""
    path = tmp_path / 'lidar.onnx'
    skip = ['conv_input', 'encoder_layers.encoder_layer1.0']
    model = calibrated('bevfusion', skip=skip)
    voxels, wanted = exported(model, path, 'bevfusion', 'xyz')
    with torch.no_grad():
        same = with_half_weights(model)(*voxels, 1)
    assert torch.equal(ScnNetwork(read_program(path))(*voxels), same)


def test_add_whose_input_is_read_in_fp16_is_fp16(tmp_path):
    """libspconv has no add of an FP16 and an INT8 tensor."""
    skip = ['conv_input', 'encoder_layers.encoder_layer1.0.conv1']
    model = calibrated('bevfusion', skip=skip)
    export_lidar(model, tmp_path / 'lidar.onnx')
    program = read_program(tmp_path / 'lidar.onnx')
    assert program.ops[3].layer == 'encoder_layers.encoder_layer1.0.add'
    assert program.ops[3].precision == 'fp16'
    model = with_half_weights(model)
    quantizers(model)['encoder_layers.encoder_layer1.0.add._input_quantizer'].keep_float('mixed')
    voxels = cloud(model)
    with torch.no_grad():
        assert torch.equal(ScnNetwork(program)(*voxels), model(*voxels, 1))


def test_float_file_of_a_quantized_encoder(tmp_path):
    model = calibrated('bevfusion')
    export_lidar(model, tmp_path / 'q.onnx', quantized=False)
    plain = build('bevfusion', seed=7)
    state = model.state_dict()
    plain.load_state_dict({n: v for n, v in state.items() if 'quantizer' not in n})
    export_lidar(plain, tmp_path / 'f.onnx')
    assert (tmp_path / 'q.onnx').read_bytes() == (tmp_path / 'f.onnx').read_bytes()


def test_files_as_nvidias_exporter_writes_them():
    """No names of layers, ranges that differ between readers, one for the first layer too."""
    model = calibrated('bevfusion')
    file = as_onnx(trace(model))
    for node in file.graph.node:
        node.doc_string = ''
        for attribute in node.attribute:
            if attribute.name in ('input0_dynamic_range', 'input1_dynamic_range'):
                attribute.f *= 1.5
    file.graph.node[0].attribute.append(helper.make_attribute('input_dynamic_range', 54.0))
    network = ScnNetwork(from_onnx(file), dtype=torch.float64)
    assert sqnr(interpret(file, *cloud(model)), network(*cloud(model))) > 200


@pytest.mark.parametrize('kept', ['int8', 'fp16'])
def test_tensor_kept_in_int8_is_so_for_fp16_readers_too(kept):
    model = calibrated('bevfusion')
    program = trace(model)
    limit = program.convs[1].input_range
    program = replace(
        program,
        ops=(
            replace(program.ops[0], output_precision=kept),
            replace(program.ops[1], precision='fp16'),  # its other reader, the add, is INT8
            *program.ops[2:],
        ),
    )
    network = ScnNetwork(program, dtype=torch.float64)
    read = []
    network.convs['conv1'].register_forward_pre_hook(lambda _, args: read.append(args[0].features))
    network(*cloud(model))
    steps = read[0] / (limit / 127)
    assert steps.abs().max() > 50
    assert torch.allclose(steps, steps.round(), atol=1e-6) == (kept == 'int8')


def test_files_without_precisions_are_fp16():
    """As those that NVIDIA's exporter makes of float models; strided rules may have no name."""
    file = as_onnx(trace(build('second')))
    for node in file.graph.node:
        odd = [a for a in node.attribute if 'precision' in a.name]
        odd += [a for a in node.attribute if a.name == 'rulebook' and a.s.startswith(b'spconv')]
        for attribute in odd:
            node.attribute.remove(attribute)
    program = from_onnx(file)
    assert {op.precision for op in program.convs} == {'fp16'}
    voxels = cloud(build('second'))
    with torch.no_grad():
        assert sqnr(build('second')(*voxels, 1), ScnNetwork(program)(*voxels)) > 60


def test_mmdet3ds_own_encoder(tmp_path):
    """Built of spconv's own layers, which are wrong on a CPU: compared through their weights."""
    torch.manual_seed(0)
    model = enliven(SparseEncoder(**SECOND))
    portable = build('second', seed=7)
    portable.load_state_dict(model.state_dict())
    export_lidar(model, tmp_path / 'a.onnx')
    export_lidar(portable, tmp_path / 'b.onnx')
    assert (tmp_path / 'a.onnx').read_bytes() == (tmp_path / 'b.onnx').read_bytes()


@cases
def test_verification(kind, order, tmp_path):
    path = tmp_path / 'lidar.onnx'
    model = calibrated(kind)
    export_lidar(model, path, order)
    cost, agreement = verify_lidar(model, path, *cloud(model))
    assert 10 < cost < 60 and agreement > 25
    export_lidar(model, path, order, quantized=False)
    cost, agreement = verify_lidar(model, path, *cloud(model), quantized=False)
    assert cost == math.inf and agreement > 50
    assert verify_lidar(model, path, *cloud(model))[1] < agreement - 5  # it is not quantized


def test_empty_cloud_gives_zeros(tmp_path):
    model = build('bevfusion')
    export_lidar(model, tmp_path / 'lidar.onnx')
    program = read_program(tmp_path / 'lidar.onnx')
    out = ScnNetwork(program)(torch.zeros(0, 5), torch.zeros(0, 4, dtype=torch.int32))
    with torch.no_grad():
        assert torch.equal(out, model(torch.zeros(0, 5), torch.zeros(0, 4), 1))
