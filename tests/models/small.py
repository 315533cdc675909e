"""Small parts of models: sparse encoders with clouds for them, settings of a view transform."""

import torch
from torch import nn

from mmdet3d_quant.models import (
    QuantBEVFusionSparseEncoder,
    QuantSparseEncoder,
)
from mmdet3d_quant.parents import (
    BEVFusionSparseEncoder,
    PortableSparseEncoder,
)

CFG = dict(
    in_channels=5,
    base_channels=8,
    output_channels=16,
    encoder_channels=((8, 12), (12, 16), (16, 16)),
    norm_cfg=dict(type='BN1d', eps=1e-3, momentum=0.01),
)
PADDINGS = ((0, 1), (0, (1, 1, 0)), (0, 0))
#: Quant type -> float parent, arguments.
KINDS = {
    'BEVFusion': (
        QuantBEVFusionSparseEncoder,
        BEVFusionSparseEncoder,
        dict(sparse_shape=[32, 24, 13], encoder_paddings=PADDINGS),
    ),
    'SECOND': (
        QuantSparseEncoder,
        PortableSparseEncoder,
        dict(sparse_shape=[13, 24, 32], encoder_paddings=((0, 1), (0, (0, 1, 1)), (0, 0))),
    ),
}
BLOCKS = ('basicblock', 'conv_module')


def kwargs_of(kind, block):
    kwargs = {**CFG, **KINDS[kind][2], 'block_type': block}
    if block == 'conv_module':
        kwargs.update(encoder_paddings=((1, 1), (1, 1), (1, 1)))
    return kwargs


def build(kind='BEVFusion', block='basicblock', **extra):
    """A float encoder and its quantized child with the same weights, in eval mode."""
    quant, parent, _ = KINDS[kind]
    torch.manual_seed(0)
    floating = parent(**kwargs_of(kind, block))
    for module in floating.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            nn.init.normal_(module.running_mean, std=0.05)
            nn.init.uniform_(module.running_var, 0.3, 1)
    quantized = quant(**kwargs_of(kind, block), **extra)
    quantized.load_state_dict(floating.state_dict(), strict=False)
    return floating.eval(), quantized.eval()


def cloud(kind='BEVFusion', count=1500, dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    shape = KINDS[kind][2]['sparse_shape']
    coords = torch.stack([torch.randint(0, n, (count,)) for n in (2, *shape)], 1).unique(dim=0)
    coords = coords[torch.randperm(len(coords))]
    return torch.randn(len(coords), 5, dtype=dtype), coords, 2


VIEW = dict(
    in_channels=8,
    out_channels=6,
    image_size=[32, 64],
    feature_size=[4, 8],
    xbound=[-8.0, 8.0, 1.0],
    ybound=[-8.0, 8.0, 1.0],
    zbound=[-10.0, 10.0, 20.0],
    dbound=[1.0, 9.0, 1.0],
    downsample=2,
)
