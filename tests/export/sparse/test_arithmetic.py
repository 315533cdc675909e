"""INT8 as each runtime computes it, against integers and sums written by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmdet3d_quant import quantizers, set_mode
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.export.sparse import ScnError, trace
from mmdet3d_quant.export.sparse.arithmetic import (
    ARITHMETICS,
    AUTOWARE,
    LIBSPCONV,
    OPENVINO,
    computed_as,
    with_int8,
)
from mmdet3d_quant.export.sparse.check import check
from mmdet3d_quant.export.sparse.program import Add, SparseConv
from mmdet3d_quant.export.sparse.run import ScnEncoder, ScnNetwork
from tests.export.sparse.encoders import build, calibrated, cloud, with_half_weights

ALL = with_int8(AUTOWARE, ('*',))


def watched(program, feats, coors, **kwargs):
    """Runs a program; returns what every convolution read and made, by its layer, and the map."""
    network = ScnNetwork(program, **kwargs)
    seen = {}
    run = network._run

    def watch(op, inputs):
        out = run(op, inputs)
        seen[op.name] = ([getattr(x, 'features', x) for x in inputs], out)
        return out

    network._run = watch
    return seen, network(feats, coors)


def neighbours(op, coors):
    """Rows of a submanifold layer's voxels under each of its weights, -1 for none, (K, N)."""
    row = {tuple(c): i for i, c in enumerate(coors[:, 1:].tolist())}
    shifts = np.stack(np.meshgrid(*(range(k) for k in op.kernel), indexing='ij'), -1).reshape(-1, 3)
    shifts = (shifts - np.array([k // 2 for k in op.kernel])).tolist()
    places = coors[:, 1:].tolist()
    return [[row.get(tuple(a + b for a, b in zip(p, s)), -1) for p in places] for s in shifts]


def test_autoware_sums_integers_between_fp16_tensors():
    """s8 x s8 to int32, one factor by channel and the bias in FP32, ReLU, FP16."""
    model = calibrated('bevfusion')
    feats, coors = cloud(model, count=300)
    program = trace(model, arithmetic=ALL)
    seen, _ = watched(program, feats, coors, fp16_tensors=True)
    op = program.convs[1]
    assert op.precision == 'int8' and op.output_precision == 'fp16' and op.subm and op.relu
    (x,), out = seen[op.name]
    x = x.numpy()
    assert np.array_equal(x, x.astype(np.float16))  # at the boundary
    step = np.float32(op.input_range) / np.float32(127)
    ints = np.clip(np.rint(x / step), -128, 127).astype(np.int64)
    channels = np.array(op.weight_ranges, np.float32) / 127
    weight = op.weight.float().numpy() / channels.reshape(-1, 1, 1, 1, 1)
    weight = np.rint(weight).astype(np.int64).reshape(len(channels), -1, ints.shape[1])
    total = np.zeros((len(ints), len(channels)), np.int64)
    for k, rows in enumerate(neighbours(op, coors)):
        picked = np.where(np.array(rows)[:, None] >= 0, ints[rows], 0)
        total += picked @ weight[:, k].T
    assert abs(total).max() > 1000
    wanted = total * (channels * step) + op.bias.float().numpy()
    wanted = np.maximum(wanted, 0).astype(np.float16)
    found = out.features.numpy()
    assert np.array_equal(found, found.astype(np.float16))
    assert np.abs(found - wanted).max() <= np.abs(wanted).max() * 2**-10  # a last bit of FP16
    assert (found == wanted).mean() > 0.99


def test_libspconv_adds_integers_and_autoware_fp16():
    model = calibrated('bevfusion')
    voxels = cloud(model)
    for arithmetic, rounds in ((LIBSPCONV, True), (ALL, False)):
        program = trace(model, arithmetic=arithmetic)
        add = next(op for op in program.ops if isinstance(op, Add) and op.layer.endswith('2.0.add'))
        assert (add.precision == 'int8') is rounds
        seen, _ = watched(program, *voxels, fp16_tensors=True)
        (a, b), out = seen[add.name]
        if rounds:
            step = add.ranges[0] / 127
            a, b = ((t / step).round().clamp(-128, 127) * step for t in (a, b))
            total = a + b
            limit = next(iter(program.ranges(add.output))) / 127
            total = (total / limit).round().clamp(-128, 127) * limit
            assert torch.allclose(out.features, total, atol=1e-5)
        else:
            assert torch.equal(out.features, (a + b).half().float())


def test_openvino_computes_sparse_layers_in_floating_point():
    model = calibrated('bevfusion')
    program = trace(model, arithmetic=OPENVINO)
    assert {op.precision for op in program.convs} == {'fp16'}
    assert all(op.input_range is None for op in program.convs)
    voxels = cloud(model)
    with set_mode(model, 'float'), torch.no_grad():
        plain = model(*voxels, 1)
    assert sqnr(plain, ScnNetwork(program)(*voxels)) > 60


@pytest.mark.parametrize('name', ARITHMETICS)
def test_fake_quantization_follows(name):
    """On equal FP16 weights the copy computes what the program does, and the encoder not."""
    model = with_half_weights(calibrated('bevfusion'))
    before = {n: q.calibrated for n, q in quantizers(model).items()}
    arithmetic = ARITHMETICS[name]
    voxels = cloud(model)
    followed = computed_as(model, arithmetic)
    assert {n: q.calibrated for n, q in quantizers(model).items()} == before  # left unchanged
    network = ScnEncoder(ScnNetwork(trace(model, arithmetic=arithmetic), dtype=torch.float64))
    with torch.no_grad():
        wanted = followed.double()(voxels[0].double(), voxels[1], 1)
        own = model.double()(voxels[0].double(), voxels[1], 1)
    found = network(*voxels, 1)
    assert sqnr(wanted, found) > 60
    if name != 'libspconv':
        assert sqnr(own, found) < 60


def test_choice_of_stages():
    model = calibrated('bevfusion')
    by_layer = {
        op.layer: op.precision
        for op in trace(model, arithmetic=AUTOWARE).ops
        if isinstance(op, SparseConv)
    }
    int8 = [layer for layer, precision in by_layer.items() if precision == 'int8']
    assert int8 and all(n.startswith(('encoder_layers.encoder_layer3', 'conv_out')) for n in int8)
    none = trace(model, arithmetic=with_int8(AUTOWARE, ()))
    assert {op.precision for op in none.convs} == {'fp16'}


def test_pattern_that_matches_nothing_is_refused():
    model = calibrated('bevfusion')
    with pytest.raises(ValueError, match=r"'encoder_layers.encoder_layer9' of autoware matches no"):
        trace(model, arithmetic=with_int8(AUTOWARE, ('encoder_layers.encoder_layer9',)))


@pytest.mark.parametrize(
    ('size', 'refused'),
    [
        (1, {LIBSPCONV: 'conv_input.*1x1x1 are computed wrongly', AUTOWARE: '1x1x1.*ImplicitGemm'}),
        (5, {AUTOWARE: 'conv_input.*5x5x5 has 125 places.*autoware has at most 32'}),
    ],
)
def test_kernels_are_refused_only_where_they_are_wrong(size, refused):
    program = trace(build('bevfusion'), arithmetic=OPENVINO)
    first = program.ops[0]
    weight = first.weight[:, :1, :1, :1].expand(-1, size, size, size, -1)
    odd = replace(first, weight=weight, padding=(size // 2,) * 3, rulebook='odd')
    program = replace(program, ops=(odd, *program.ops[1:]))
    for arithmetic in ARITHMETICS.values():
        judged = replace(program, arithmetic=arithmetic)
        if arithmetic not in refused:
            check(judged)
            continue
        with pytest.raises(ScnError, match=refused[arithmetic]):
            check(judged)
