"""Quantized layers, registered in mmengine's root registry: `conv_cfg=dict(type='QuantConv2d')`."""

from mmdet3d_quant.layers.conv import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from mmdet3d_quant.layers.join import QuantAdd, QuantConcat
from mmdet3d_quant.layers.linear import QuantLinear
from mmdet3d_quant.layers.sparse import (
    QuantMMCVSparseConv3d,
    QuantMMCVSubMConv3d,
    QuantSparseConv3d,
    QuantSubMConv3d,
)

__all__ = [
    'QuantAdd',
    'QuantConcat',
    'QuantConv1d',
    'QuantConv2d',
    'QuantConv3d',
    'QuantConvTranspose1d',
    'QuantConvTranspose2d',
    'QuantConvTranspose3d',
    'QuantLinear',
    'QuantMMCVSparseConv3d',
    'QuantMMCVSubMConv3d',
    'QuantSparseConv3d',
    'QuantSubMConv3d',
]
