"""Quantized camera-to-BEV transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmdet3d.registry import MODELS
from torch import nn

from mmdet3d_quant.core.known import KnownRange
from mmdet3d_quant.layers import QuantConv2d
from mmdet3d_quant.models.base import Formats, Skip, finish
from mmdet3d_quant.parents import DepthLSSTransform, LSSTransform

if TYPE_CHECKING:
    from mmdet3d_quant.parents.view_base import ViewTransform as _View
else:
    _View = object


class _QuantView(_View):
    """Quantizes the per-image convolutions, and the BEV ones only when asked."""

    def __init__(
        self,
        *args: Any,
        quantize_downsample: bool = False,
        skip: Skip = (),
        learn_amax: bool = False,
        format: Formats = (),
        **kwargs: Any,
    ):
        self.quantize_downsample = quantize_downsample
        super().__init__(*args, **kwargs)
        finish(self, skip, learn_amax, format)

    def _conv(self, part: str, *args: Any, **kwargs: Any) -> nn.Conv2d:
        quantized = part != 'downsample' or self.quantize_downsample
        return (QuantConv2d if quantized else nn.Conv2d)(*args, **kwargs)


@MODELS.register_module()
class QuantLSSTransform(_QuantView, LSSTransform):
    """``LSSTransform`` with ``depthnet`` quantized; takes its arguments.

    Args:
        quantize_downsample: Also quantize ``downsample``, which keeps little of the splat.
        skip: Layers to keep float: name patterns, or ``{pattern: reason}``.
        learn_amax: Let training learn the ranges of activations.
        format: Number format, ``'int8'`` (the default) or ``'fp8'``, for all or by name pattern.
    """


@MODELS.register_module()
class QuantDepthLSSTransform(_QuantView, DepthLSSTransform):
    """``DepthLSSTransform`` with ``dtransform`` and ``depthnet`` quantized; takes its arguments.

    The depth map has a range that is known: the end of the depth bins, beyond which nothing is
    lifted. So a far return does not widen the steps of the others. A method that a calibration
    plan names for ``dtransform.0._input_quantizer`` counts more.

    Args:
        quantize_downsample: Also quantize ``downsample``, which keeps little of the splat.
        skip: Layers to keep float: name patterns such as ``'dtransform.0'``, or
            ``{pattern: reason}``.
        learn_amax: Let training learn the ranges of activations.
        format: Number format, ``'int8'`` (the default) or ``'fp8'``, for all or by name pattern.
    """

    def _build(self) -> None:
        super()._build()
        depths = self.dtransform[0]._input_quantizer
        depths.known = KnownRange(float(self.dbound[1]), 'end of the depth bins, dbound')
