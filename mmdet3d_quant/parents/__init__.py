"""Float parts of BEVFusion that quantized types subclass; importing them registers nothing.

They take the arguments, and keep the state-dict keys and numerics, of the types with the same
names in the public BEVFusion project of mmdet3d. Each has a seam where a subclass puts its own
layers: ``concat`` in the neck, ``_conv`` in the view transforms and the fuser, ``convs`` and
``block`` in the sparse encoders.
"""

from mmdet3d_quant.parents.bev_pool import bev_pool
from mmdet3d_quant.parents.fuser import ConvFuser
from mmdet3d_quant.parents.lss_fpn import GeneralizedLSSFPN
from mmdet3d_quant.parents.sparse_encoder import BEVFusionSparseEncoder, PortableSparseEncoder
from mmdet3d_quant.parents.view_transform import DepthLSSTransform, LSSTransform

__all__ = [
    'BEVFusionSparseEncoder',
    'ConvFuser',
    'DepthLSSTransform',
    'GeneralizedLSSFPN',
    'LSSTransform',
    'PortableSparseEncoder',
    'bev_pool',
]
