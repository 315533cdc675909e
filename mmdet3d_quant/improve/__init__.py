"""Changes of weights that leave the float model as it is and make it fit INT8 better."""

from mmdet3d_quant.improve.equalize import Equalization, Left, equalize_concats
from mmdet3d_quant.improve.moves import Move

__all__ = ['Equalization', 'Left', 'Move', 'equalize_concats']
