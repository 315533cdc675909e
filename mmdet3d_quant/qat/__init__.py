"""Quantization-aware training on mmengine's stock Runner.

Importing this package registers ``QATHook`` and ``DistillHook``; a config names them in
``custom_hooks``. See ``docs/qat.md``.
"""

from mmdet3d_quant.qat.distill import DistillHook
from mmdet3d_quant.qat.hook import QATHook
from mmdet3d_quant.qat.moving import LearnedRanges, WeightRanges

__all__ = ['DistillHook', 'LearnedRanges', 'QATHook', 'WeightRanges']
