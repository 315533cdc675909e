"""Quantization-aware training on mmengine's stock Runner.

Importing this package registers ``QATHook``, ``DistillHook`` and ``FreezeHook``; a config names
them in ``custom_hooks``. See ``docs/qat.md``.
"""

from mmdet3d_quant.qat.distill import DistillHook
from mmdet3d_quant.qat.freeze import FreezeHook
from mmdet3d_quant.qat.hook import QATHook
from mmdet3d_quant.qat.moving import LearnedRanges, WeightRanges

__all__ = ['DistillHook', 'FreezeHook', 'LearnedRanges', 'QATHook', 'WeightRanges']
