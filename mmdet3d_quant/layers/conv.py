"""Quantized 2-D convolutions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmdet3d_quant.layers.base import QuantLayer


@MODELS.register_module()
class QuantConv2d(nn.Conv2d, QuantLayer):
    """``nn.Conv2d`` with quantized input (per tensor) and weight (per output channel).

    Takes the arguments of ``nn.Conv2d``. In float mode it equals it bit for bit.
    """

    # Direct child of nn.Conv2d: mmengine's `init_cfg=dict(layer='Conv2d')` looks no further.

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_quantizers()

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Not `forward`: mmcv's efficient_conv_bn_eval calls this one directly.
        return super()._conv_forward(
            self._input_quantizer(input), self._weight_quantizer(weight), bias
        )


@MODELS.register_module()
class QuantConvTranspose2d(nn.ConvTranspose2d, QuantLayer):
    """``nn.ConvTranspose2d`` with quantized input (per tensor) and weight (per output channel).

    Takes the arguments of ``nn.ConvTranspose2d``. The weight has shape (in, out / groups, kH,
    kW), so output channels are its axis 1 (pytorch-quantization's default is axis 0); with
    groups, channels of equal index in their group share a range.
    """

    weight_axis = 1

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_quantizers()

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Transposed convolution of an (N, C, H, W) tensor; see ``nn.ConvTranspose2d``."""
        output_padding = self._output_padding(  # torch types the arguments as lists only
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        return F.conv_transpose2d(
            self._input_quantizer(input),
            self._weight_quantizer(self.weight),
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            output_padding,
            self.groups,
            self.dilation,
        )
