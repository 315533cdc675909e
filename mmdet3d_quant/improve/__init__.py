"""Changes of weights and ranges that make a model fit INT8 better."""

from mmdet3d_quant.improve.bias import BiasCorrection
from mmdet3d_quant.improve.channel_factors import Scaled
from mmdet3d_quant.improve.cross_layer import equalize_layers
from mmdet3d_quant.improve.empty_cells import EmptyCells
from mmdet3d_quant.improve.equalize import Equalization, Left, equalize_concats
from mmdet3d_quant.improve.moves import ChannelMove, Move
from mmdet3d_quant.improve.norms import NormReestimation
from mmdet3d_quant.improve.rounding import LearnedRounding
from mmdet3d_quant.improve.smooth import smooth_linears
from mmdet3d_quant.improve.task_ranges import TaskRanges

__all__ = [
    'BiasCorrection',
    'ChannelMove',
    'EmptyCells',
    'Equalization',
    'LearnedRounding',
    'Left',
    'Move',
    'NormReestimation',
    'Scaled',
    'TaskRanges',
    'equalize_concats',
    'equalize_layers',
    'smooth_linears',
]
