"""Quantized neck of BEVFusion's camera branch."""

from __future__ import annotations

from typing import Any, Sequence

from mmdet3d.registry import MODELS
from torch import Tensor, nn

from mmdet3d_quant.layers import QuantConcat
from mmdet3d_quant.models.base import Formats, Skip, arguments, finish, quant_conv_cfg
from mmdet3d_quant.parents import GeneralizedLSSFPN


@MODELS.register_module()
class QuantGeneralizedLSSFPN(GeneralizedLSSFPN):
    """``GeneralizedLSSFPN``, quantized; takes its arguments.

    Each top-down step joins two maps in a ``QuantConcat`` whose scale is also the input scale of
    the lateral convolution that reads the result.

    Args:
        skip: Layers to keep float: name patterns such as ``'lateral_convs.0'``, or
            ``{pattern: reason}``.
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
        bound = arguments(GeneralizedLSSFPN, args, kwargs)
        bound['conv_cfg'] = quant_conv_cfg(bound.get('conv_cfg'))
        super().__init__(**bound)
        self.concats = nn.ModuleList(QuantConcat(dim=1) for _ in self.lateral_convs)
        finish(self, skip, learn_amax, format)

    def concat(self, level: int, tensors: Sequence[Tensor]) -> Tensor:
        """Joins a level's map with the upsampled coarser one on one grid."""
        return self.concats[level](tensors)

    def quant_ties(self) -> list[list[str]]:
        """Ties the concat and the lateral convolution of each level."""
        return [
            [f'concats.{i}._input_quantizer', f'lateral_convs.{i}.conv._input_quantizer']
            for i in range(len(self.concats))
        ]

    def input_readers(self) -> list[list[str]]:
        """Lists the concat that reads each input; the coarsest is only read upsampled."""
        levels = range(-self.start_level, len(self.in_channels) - self.start_level)
        return [
            [f'concats.{i}._input_quantizer'] if 0 <= i < len(self.concats) else [] for i in levels
        ]
