"""The sparse encoder against dense convolutions, and the clouds that break others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdet3d_quant.parents import BEVFusionSparseEncoder

CFG = dict(
    in_channels=5,
    sparse_shape=[48, 40, 13],
    base_channels=8,
    output_channels=16,
    encoder_channels=((8, 12), (12, 16), (16, 16)),
    encoder_paddings=((0, 1), (0, (1, 1, 0)), (0, 0)),
    block_type='basicblock',
    norm_cfg=dict(type='BN1d', eps=1e-3, momentum=0.01),
)


def build(**kwargs):
    torch.manual_seed(0)
    model = BEVFusionSparseEncoder(**({**CFG, **kwargs})).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model


def cloud(count=3000):
    torch.manual_seed(1)
    coords = torch.stack([torch.randint(0, n, (count,)) for n in (2, *CFG['sparse_shape'])], 1)
    coords = coords.unique(dim=0)
    coords = coords[torch.randperm(len(coords))]
    return torch.randn(len(coords), 5), coords


def dense(model, feats, coords, batch):
    """The same network with dense convolutions: a cell is active if a sparse one would be."""
    x = torch.zeros(batch, *CFG['sparse_shape'], feats.shape[1])
    x[tuple(coords.T)] = feats
    active = torch.zeros(batch, *CFG['sparse_shape'])
    active[tuple(coords.T)] = 1
    x, active = x.permute(0, 4, 1, 2, 3), active[:, None]

    def conv_norm(x, active, conv, norm):
        submanifold = conv.subm
        geometry = dict(stride=1 if submanifold else conv.stride)
        geometry['padding'] = [k // 2 for k in conv.kernel_size] if submanifold else conv.padding
        if not submanifold:
            active = F.conv3d(active, torch.ones(1, 1, *conv.kernel_size), **geometry) > 0
            active = active.float()
        x = F.conv3d(x, conv.weight.permute(0, 4, 1, 2, 3), **geometry)
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
                x = (x + y).relu()
            else:
                x, active = conv_norm(x, active, block[0], block[1])
                x = x.relu()
    x, _ = conv_norm(x, active, model.conv_out[0], model.conv_out[1])
    x = x.relu()
    return torch.cat([x[:, c] for c in range(x.shape[1])], -1).permute(0, 3, 1, 2)


@torch.no_grad()
def test_agrees_with_dense_convolutions():
    model, (feats, coords) = build(), cloud()
    out = model(feats, coords, 2)
    wanted = dense(model, feats, coords, 2)
    assert out.shape == wanted.shape == (2, 16, 12, 10)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_is_deterministic_with_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model, (feats, coords) = build(), cloud()
        first = model(feats, coords, 2)
        assert all(torch.equal(first, model(feats, coords, 2)) for _ in range(8))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@pytest.mark.parametrize('batch', [1, 2])
def test_empty_cloud_gives_zeros(batch):
    model, (feats, coords) = build(), cloud()
    out = model(feats[:0], coords[:0], batch)
    assert out.shape == (batch, *model(feats, coords, 2).shape[1:]) and out.eq(0).all()


@torch.no_grad()
def test_sample_without_voxels_gives_zeros_for_it_alone():
    model, (feats, coords) = build(), cloud()
    first = coords[:, 0] == 0
    out = model(feats[first], coords[first], 2)
    assert out[1].eq(0).all() and out[0].abs().sum() > 0


@torch.no_grad()
def test_middle_features():
    feats, coords = cloud()
    bev, stages = build(return_middle_feats=True)(feats, coords, 2)
    assert bev.shape == (2, 16, 12, 10) and len(stages) == 3
