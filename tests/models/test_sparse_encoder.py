"""Quantized sparse encoders: against dense convolutions of rounded tensors, and odd clouds."""

import pytest
import torch
import torch.nn.functional as F
from mmdet3d.models.layers import SparseBasicBlock
from mmdet3d.models.middle_encoders import SparseEncoder
from mmdet3d.registry import MODELS
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.core import modes
from mmdet3d_quant.layers import QuantSparseConv3d, QuantSubMConv3d
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.models import (
    QuantBEVFusionSparseEncoder,
    QuantSparseBasicBlock,
)
from tests.models.small import BLOCKS, KINDS, build, cloud, kwargs_of


def each(kinds=KINDS, blocks=BLOCKS):
    return [(kind, block) for kind in kinds for block in blocks]


@pytest.mark.parametrize('kind, block', each())
def test_float_mode_trains_like_the_parent_bit_for_bit(kind, block):
    results = []
    for model in build(kind, block):
        mq.set_mode(model, 'float')
        model.train()
        feats, coords, batch = cloud(kind)
        feats.requires_grad_()
        out = model(feats, coords, batch)
        out.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        running = {n: b for n, b in model.named_buffers() if 'amax' not in n}
        results.append([out, feats.grad, grads, running])
    (out, x, grads, running), (out2, x2, grads2, running2) = results
    assert torch.equal(out, out2) and torch.equal(x, x2) and out.abs().sum() > 0
    for wanted, found in ((grads, grads2), (running, running2)):
        assert wanted.keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_float_mode_equals_mmdet3ds_own_on_one_thread():
    """On more threads spconv loses summands on a CPU."""
    _, quantized = build('SECOND')
    theirs = SparseEncoder(**kwargs_of('SECOND', 'basicblock')).eval()
    theirs.load_state_dict(modes.float_state_dict(quantized))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), mq.set_mode(quantized, 'float'):
            a, b = theirs(*cloud('SECOND')), quantized(*cloud('SECOND'))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def rounded(x, amax):
    """Written out: to the grid and back."""
    step = amax / 127
    return (x / step).round().clamp(-128, 127) * step


def dense(model, feats, coords, batch):
    """The fake-quantized network with dense tensors, masked to the sites that are active."""
    shape = list(model.sparse_shape)
    x = torch.zeros(batch, *shape, feats.shape[1], dtype=feats.dtype)
    x[tuple(coords.T)] = feats
    active = torch.zeros(batch, *shape, dtype=feats.dtype)
    active[tuple(coords.T)] = 1
    x, active = x.permute(0, 4, 1, 2, 3), active[:, None]

    def conv_norm(x, active, conv, norm):
        weight = conv.weight
        if conv._input_quantizer.float_reason is None:
            x = rounded(x, conv._input_quantizer.amax)
            weight = rounded(weight, conv._weight_quantizer.amax)
        geometry = dict(stride=1 if conv.subm else conv.stride)
        geometry['padding'] = [k // 2 for k in conv.kernel_size] if conv.subm else conv.padding
        if not conv.subm:
            reach = torch.ones(1, 1, *conv.kernel_size, dtype=x.dtype)
            active = (F.conv3d(active, reach, **geometry) > 0).to(x.dtype)
        x = F.conv3d(x, weight.permute(0, 4, 1, 2, 3), **geometry)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        return (x * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)) * active, active

    x, active = conv_norm(x, active, model.conv_input[0], model.conv_input[1])
    x = x.relu()
    for stage in model.encoder_layers:
        for block in stage:
            if hasattr(block, 'conv1'):
                y, _ = conv_norm(x, active, block.conv1, block.bn1)
                y, _ = conv_norm(y.relu(), active, block.conv2, block.bn2)
                amax = block.add._input_quantizer.amax
                x = (rounded(x, amax) + rounded(y, amax)).relu()
            else:
                x, active = conv_norm(x, active, block[0], block[1])
                x = x.relu()
    x, _ = conv_norm(x, active, model.conv_out[0], model.conv_out[1])
    return x.relu()


@torch.no_grad()
@pytest.mark.parametrize('skip', [None, ()], ids=['default', 'everything'])
@pytest.mark.parametrize('kind, block', each())
def test_equals_dense_convolutions_of_rounded_tensors(kind, block, skip):
    """In float64: in float32 a rounding tie flips here and there, and a deep net spreads it."""
    _, model = build(kind, block, **({} if skip is None else dict(skip=skip)))
    mq.calibrate(model, [cloud(kind), cloud(kind, seed=2)])
    model.double()
    feats, coords, batch = cloud(kind, dtype=torch.float64, seed=3)
    out = model(feats, coords, batch)
    wanted = dense(model, feats, coords, batch)
    if kind == 'BEVFusion':
        wanted = wanted.permute(0, 1, 4, 2, 3)
    wanted = wanted.flatten(1, 2)
    assert out.shape == wanted.shape and wanted.abs().max() > 0.1
    torch.testing.assert_close(out, wanted, atol=1e-9, rtol=1e-9)
    with mq.set_mode(model, 'float'):
        assert not torch.allclose(model(feats, coords, batch), wanted, atol=1e-3)


def test_the_first_convolution_is_float_for_a_reason_unless_asked():
    def quantizers(**extra):
        kwargs = kwargs_of('BEVFusion', 'basicblock')
        return mq.quantizers(QuantBEVFusionSparseEncoder(**kwargs, **extra))

    reasons = {n: q.float_reason for n, q in quantizers().items() if q.float_reason is not None}
    assert {n.rpartition('.')[0] for n in reasons} == {'conv_input.0'}
    assert all('metres' in reason for reason in reasons.values())
    assert not any(q.float_reason for q in quantizers(skip=()).values())
    reasons = {n for n, q in quantizers(skip='conv_out').items() if q.float_reason is not None}
    assert reasons == {'conv_out.0._input_quantizer', 'conv_out.0._weight_quantizer'}
    with pytest.raises(ValueError, match="'conv99' matches no quantized layer of QuantBEVFusion"):
        quantizers(skip=['conv99'])


@pytest.mark.parametrize('kind, block', each())
def test_layers_that_read_one_tensor_share_a_group(kind, block):
    """Independent of the declarations: runs the encoder and compares the tensors read."""
    _, model = build(kind, block)
    readers, alive = {}, []

    def note(name):
        def hook(module, args):
            alive.append(args[0])
            readers.setdefault(id(args[0]), set()).add(name)

        return hook

    for name, quantizer in mq.quantizers(model).items():
        if not name.endswith('_weight_quantizer'):
            quantizer.register_forward_pre_hook(note(name))
    with mq.set_mode(model, 'float'), torch.no_grad():
        model(*cloud(kind))
    found = {frozenset(names) for names in readers.values() if len(names) > 1}
    assert found == {frozenset(group) for group in mq.ties(model)}
    assert len(found) == (4 if block == 'basicblock' else 0)


def test_a_downsample_shares_the_input_of_its_block():
    make = dict(inplanes=4, planes=6)
    down = nn.Sequential(QuantSubMConv3d(4, 6, 1), nn.BatchNorm1d(6))
    block = QuantSparseBasicBlock(**make, downsample=down)
    assert mq.ties(block) == [('conv1._input_quantizer', 'downsample.0._input_quantizer')]
    assert mq.ties(QuantSparseBasicBlock(4, 4)) == [
        ('conv1._input_quantizer', 'add._input_quantizer')
    ]


def test_blocks_take_the_arguments_of_their_parent():
    kinds = [None, dict(type='SubMConv3d', indice_key='a'), dict(type='QuantSubMConv3d')]
    for cfg in kinds:
        block = MODELS.build(dict(type='QuantSparseBasicBlock', inplanes=4, planes=4, conv_cfg=cfg))
        assert type(block.conv1) is QuantSubMConv3d and isinstance(block, SparseBasicBlock)
    assert QuantSparseBasicBlock(4, 4, conv_cfg=kinds[1]).conv1.indice_key == 'a'
    assert kinds[1]['type'] == 'SubMConv3d'
    with pytest.raises(ValueError, match="'SparseInverseConv3d' cannot be quantized.*'SubMConv3d'"):
        QuantSparseBasicBlock(4, 4, conv_cfg=dict(type='SparseInverseConv3d'))
    with pytest.raises(TypeError, match='SparseBasicBlock'):
        QuantSparseBasicBlock(4, 4, colour='red')


@pytest.mark.parametrize('kind', KINDS)
def test_positional_arguments_are_those_of_the_parent(kind):
    kwargs = KINDS[kind][2]
    model = KINDS[kind][0](5, kwargs['sparse_shape'])
    assert model.sparse_shape == kwargs['sparse_shape'] and model.output_channels == 128
    kinds = {type(m) for m in model.modules() if isinstance(m, QuantLayer)}
    assert kinds == {QuantSubMConv3d, QuantSparseConv3d}


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('version', [None, 2])
@pytest.mark.parametrize('turned', [False, True])
def test_weights_of_either_layout_load(kind, version, turned):
    """With the version that tells it, without, and with one that is wrong."""
    _, model = build(kind)
    mq.calibrate(model, [cloud(kind)])
    wanted = model(*cloud(kind))
    state = model.state_dict()
    if turned:
        for name, value in state.items():
            if value.dim() == 5:
                state[name] = value.permute(1, 2, 3, 4, 0)
    for entry in state._metadata.values():
        entry.pop('version', None)
        if version is not None:
            entry['version'] = version
    _, other = build(kind)
    for parameter in other.parameters():
        parameter.data.fill_(1.0)
    other.load_state_dict(state)
    assert torch.equal(other(*cloud(kind)), wanted)


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('method', ['max', 'mse', 'entropy', 'percentile:99.9', 'auto'])
def test_every_method_calibrates(kind, method):
    floating, model = build(kind)
    plan = [method, 'encoder_layers.encoder_layer2=percentile:99.99']
    result = mq.calibrate(model, [cloud(kind, seed=s) for s in (1, 2, 3)], plan)
    exact, found = floating(*cloud(kind)), model(*cloud(kind))
    assert 0 < (exact - found).norm() / exact.norm() < 0.1
    chosen = {r.name: r.method for r in result.ranges}
    assert chosen['encoder_layers.encoder_layer2.0.conv1._input_quantizer'] == 'percentile:99.99'
    first = chosen['encoder_layers.encoder_layer1.0.conv1._input_quantizer']
    assert first.startswith(method.partition(':')[0])
    assert not modes.uncalibrated(model)
    sizes = {r.name: r.num_elements for r in result.ranges}
    sites = sum(len(cloud(kind, seed=s)[0]) for s in ((1, 2) if method == 'auto' else (1, 2, 3)))
    assert sizes['encoder_layers.encoder_layer1.0.conv1._input_quantizer'] == 8 * sites


@torch.no_grad()
def test_ranges_depend_on_neither_the_order_of_batches_nor_that_of_voxels():
    ranges = []
    for order, shuffle in (((1, 2, 3), False), ((3, 1, 2), False), ((1, 2, 3), True)):
        _, model = build()
        batches = []
        for seed in order:
            feats, coords, batch = cloud(seed=seed)
            rows = torch.randperm(len(feats)) if shuffle else torch.arange(len(feats))
            batches.append((feats[rows], coords[rows], batch))
        ranges.append([r.amax for r in mq.calibrate(model, batches).ranges])
    assert ranges[0] == ranges[1]
    assert ranges[0] == pytest.approx(ranges[2], rel=1e-3)  # sums of floats in another order


@torch.no_grad()
@pytest.mark.parametrize('kind, block', each())
@pytest.mark.parametrize('count', [0, 1])
def test_a_cloud_of_no_voxels_or_one(kind, block, count):
    floating, model = build(kind, block)
    mq.calibrate(model, [cloud(kind)])
    feats, coords, batch = cloud(kind)
    coords[0, 1:] = 4
    out = model(feats[:count], coords[:count], batch)
    wanted = floating(feats[:count], coords[:count], batch)
    assert out.shape == wanted.shape == model(feats, coords, batch).shape
    if count == 0:
        assert out.eq(0).all() and wanted.eq(0).all()
    else:
        other = 1 - int(coords[0, 0])
        assert out[other].eq(0).all() and wanted.abs().max() > 0
        assert 0 < (out - wanted).norm() / wanted.norm() < 0.2


def test_voxels_that_no_strided_convolution_reaches_leave_an_empty_map():
    """A sparse tensor may run out of sites on the way; in training with learned ranges, too."""
    kwargs = kwargs_of('BEVFusion', 'basicblock')
    kwargs.update(sparse_shape=[32, 24, 14], encoder_paddings=((0, (1, 1, 0)), (0, 1), (0, 0)))
    model = QuantBEVFusionSparseEncoder(**kwargs, learn_amax=True, return_middle_feats=True).eval()
    mq.calibrate(model, [cloud()])
    feats, coords = torch.randn(1, 5), torch.tensor([[1, 9, 9, 13]])
    out, stages = model(feats, coords, 2)
    assert [len(x.features) for x in stages] == [0, 0, 0] and out.eq(0).all()
    out.sum().backward()
    reached = coords - torch.tensor([0, 0, 0, 1])
    assert model(feats, reached, 2)[0].abs().max() > 0


@torch.no_grad()
@pytest.mark.slow
def test_three_hundred_thousand_voxels():
    kwargs = dict(sparse_shape=[1440, 1440, 41], block_type='basicblock')
    kwargs.update(
        encoder_channels=((16, 16, 32), (32, 32, 64), (64, 64, 128), (128, 128)),
        encoder_paddings=((0, 0, 1), (0, 0, 1), (0, 0, (1, 1, 0)), (0, 0)),
    )
    torch.manual_seed(0)
    model = QuantBEVFusionSparseEncoder(5, **kwargs).eval()
    columns = [torch.randint(0, n, (310_000,)) for n in (1, 1440, 1440, 41)]
    coords = torch.stack(columns, 1).unique(dim=0)[:300_000]
    feats = torch.randn(len(coords), 5)
    assert len(feats) == 300_000
    mq.calibrate(model, [(feats[:20_000], coords[:20_000], 1)])
    out = model(feats, coords, 1)
    with mq.set_mode(model, 'float'):
        wanted = model(feats, coords, 1)
    assert out.shape == (1, 256, 180, 180)
    assert 0 < (out - wanted).norm() / wanted.norm() < 0.2
