"""Quantized models, registered in mmdet3d's registry: `type='QuantResNet'`."""

from mmdet3d_quant.models.fuser import QuantConvFuser
from mmdet3d_quant.models.lss_fpn import QuantGeneralizedLSSFPN
from mmdet3d_quant.models.quant import Quant
from mmdet3d_quant.models.quantized import Quantized
from mmdet3d_quant.models.resnet import QuantBasicBlock, QuantBottleneck, QuantResNet
from mmdet3d_quant.models.second import QuantSECOND, QuantSECONDFPN
from mmdet3d_quant.models.sparse_encoder import (
    QuantBEVFusionSparseEncoder,
    QuantSparseBasicBlock,
    QuantSparseEncoder,
)
from mmdet3d_quant.models.transfusion_head import QuantTransFusionHead
from mmdet3d_quant.models.view_transform import QuantDepthLSSTransform, QuantLSSTransform

__all__ = [
    'Quant',
    'QuantBEVFusionSparseEncoder',
    'QuantBasicBlock',
    'QuantBottleneck',
    'QuantConvFuser',
    'QuantDepthLSSTransform',
    'QuantGeneralizedLSSFPN',
    'QuantLSSTransform',
    'QuantResNet',
    'QuantSECOND',
    'QuantSECONDFPN',
    'QuantSparseBasicBlock',
    'QuantSparseEncoder',
    'QuantTransFusionHead',
    'Quantized',
]
