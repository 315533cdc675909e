"""Quantized layers, registered in mmengine's root registry: `conv_cfg=dict(type='QuantConv2d')`."""

from mmdet3d_quant.layers.conv import QuantConv2d, QuantConvTranspose2d
from mmdet3d_quant.layers.join import QuantConcat
from mmdet3d_quant.layers.linear import QuantLinear

__all__ = ['QuantConcat', 'QuantConv2d', 'QuantConvTranspose2d', 'QuantLinear']
