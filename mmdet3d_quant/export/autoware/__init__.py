"""Files for Autoware: one body from voxels to boxes, with sparse convolutions as its plugins."""

from mmdet3d_quant.export.autoware.suite import autoware_cuts, finish_autoware

__all__ = ['autoware_cuts', 'finish_autoware']
