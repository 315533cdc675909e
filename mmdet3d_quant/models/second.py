"""Quantized BEV backbone and neck of SECOND, PointPillars, CenterPoint and BEVFusion."""

from __future__ import annotations

import inspect
from typing import Any

from mmdet3d.models.backbones import SECOND
from mmdet3d.models.necks import SECONDFPN
from mmdet3d.registry import MODELS

from mmdet3d_quant.models.base import (
    Formats,
    Skip,
    arguments,
    finish,
    quant_conv_cfg,
    quant_upsample_cfg,
)


def _default(parent: type, name: str) -> Any:
    return inspect.signature(parent).parameters[name].default


@MODELS.register_module()
class QuantSECOND(SECOND):
    """mmdet3d's ``SECOND``, quantized; takes its arguments.

    Args:
        skip: Layers to keep float: name patterns such as ``'blocks.0.0'``, or
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
        bound = arguments(SECOND, args, kwargs)
        conv_cfg = bound.get('conv_cfg', _default(SECOND, 'conv_cfg'))
        bound['conv_cfg'] = quant_conv_cfg(conv_cfg)
        super().__init__(**bound)
        finish(self, skip, learn_amax, format)

    def output_readers(self) -> list[list[str]]:
        """Lists, for each output, the first convolution of the next block, which reads it, too."""
        last = len(self.blocks) - 1
        return [
            [f'blocks.{i + 1}.0._input_quantizer'] if i < last else []
            for i in range(len(self.blocks))
        ]


@MODELS.register_module()
class QuantSECONDFPN(SECONDFPN):
    """mmdet3d's ``SECONDFPN``, quantized; takes its arguments.

    Args:
        skip: Layers to keep float: name patterns such as ``'deblocks.1'``, or
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
        bound = arguments(SECONDFPN, args, kwargs)
        conv_cfg = bound.get('conv_cfg', _default(SECONDFPN, 'conv_cfg'))
        upsample_cfg = bound.get('upsample_cfg', _default(SECONDFPN, 'upsample_cfg'))
        bound['conv_cfg'] = quant_conv_cfg(conv_cfg)
        bound['upsample_cfg'] = quant_upsample_cfg(upsample_cfg)
        super().__init__(**bound)
        finish(self, skip, learn_amax, format)

    def input_readers(self) -> list[list[str]]:
        """Lists, for each input, the layer of its deblock."""
        return [[f'deblocks.{i}.0._input_quantizer'] for i in range(len(self.deblocks))]
