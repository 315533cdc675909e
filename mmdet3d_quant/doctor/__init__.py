"""What an environment has, what will be fast and what will be wrong in it.

This room knows the standard library alone, so that it also speaks where torch is missing or broken.
``facts`` gathers plain values, ``judge`` makes lines of them.
"""

from mmdet3d_quant.doctor.facts import gather
from mmdet3d_quant.doctor.judge import judge
from mmdet3d_quant.doctor.line import NOTE, OK, SLOW, WRONG, Line

__all__ = ['NOTE', 'OK', 'SLOW', 'WRONG', 'Line', 'gather', 'judge']
