"""Quantized camera-LiDAR fusion."""

from __future__ import annotations

from typing import Any

from mmdet3d.registry import MODELS
from torch import nn

from mmdet3d_quant.layers import QuantConv2d
from mmdet3d_quant.models.base import Formats, Skip, finish
from mmdet3d_quant.parents import ConvFuser


@MODELS.register_module()
class QuantConvFuser(ConvFuser):
    """``ConvFuser``, quantized; takes its arguments.

    Both BEV maps are quantized as one tensor after they are joined, with one scale.

    Args:
        skip: Layers to keep float: name patterns, or ``{pattern: reason}``.
        learn_amax: Let training learn the ranges of activations.
        format: Number format, ``'int8'`` (the default) or ``'fp8'``, for all or by name pattern.
    """

    def __init__(
        self,
        *args: Any,
        skip: Skip = (),
        learn_amax: bool = False,
        format: Formats = (),
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        finish(self, skip, learn_amax, format)

    def _conv(self, *args: Any, **kwargs: Any) -> nn.Conv2d:
        return QuantConv2d(*args, **kwargs)
