"""A small cloud with the dense convolution of it, and a small view transform."""

import torch
import torch.nn.functional as F

from mmdet3d_quant.parents import DepthLSSTransform

SHAPE, BATCH = [9, 8, 7], 2


def cloud(dtype=torch.float32, count=150):
    torch.manual_seed(0)
    coords = torch.stack([torch.randint(0, n, (count,)) for n in (BATCH, *SHAPE)], 1).unique(dim=0)
    coords = coords[torch.randperm(len(coords))].int()
    return torch.randn(len(coords), 4, dtype=dtype), coords


def at(dense, coords):
    """Values of a dense map (B, C, X, Y, Z) at the voxels, (n, C)."""
    b, x, y, z = coords.long().T
    return dense[b, :, x, y, z]


def dense(conv, feats, coords, out_coords):
    grid = torch.zeros(BATCH, *SHAPE, 4, dtype=feats.dtype)
    grid = grid.index_put(tuple(coords.long().T), feats).permute(0, 4, 1, 2, 3)
    padding = [k // 2 for k in conv.kernel_size] if conv.subm else conv.padding
    stride = 1 if conv.subm else conv.stride
    weight = conv.weight.permute(0, 4, 1, 2, 3)
    return at(F.conv3d(grid, weight, conv.bias, stride, padding), out_coords)


CFG = dict(
    in_channels=6,
    out_channels=4,
    image_size=(16, 24),
    feature_size=(2, 3),
    xbound=[-8.0, 8.0, 2.0],
    ybound=[-6.0, 6.0, 2.0],
    zbound=[-4.0, 4.0, 4.0],
    dbound=[1.0, 7.0, 1.0],
)
CAMS = 2


def build(kind=DepthLSSTransform, **kwargs):
    torch.manual_seed(0)
    return kind(**({**CFG, **kwargs})).eval()
