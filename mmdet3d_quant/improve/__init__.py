"""Changes of weights that make a model fit INT8 better."""

from mmdet3d_quant.improve.bias import BiasCorrection
from mmdet3d_quant.improve.empty_cells import EmptyCells
from mmdet3d_quant.improve.equalize import Equalization, Left, equalize_concats
from mmdet3d_quant.improve.moves import Move
from mmdet3d_quant.improve.rounding import LearnedRounding
from mmdet3d_quant.improve.task_ranges import TaskRanges

__all__ = [
    'BiasCorrection',
    'EmptyCells',
    'Equalization',
    'LearnedRounding',
    'Left',
    'Move',
    'TaskRanges',
    'equalize_concats',
]
