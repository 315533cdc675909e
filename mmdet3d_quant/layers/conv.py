"""Quantized convolutions, plain and transposed, in one, two and three dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmdet3d_quant.layers.base import QuantLayer

# torch's layer is a direct parent of each: mmengine's `init_cfg=dict(layer='Conv2d')` looks no
# further.
if TYPE_CHECKING:
    _Plain = nn.Conv2d
    _Upward = nn.ConvTranspose2d
else:
    _Plain = _Upward = object


class _Conv(QuantLayer, _Plain):
    """What plain convolutions share; mixed into those of torch."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_quantizers()

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Not `forward`: mmcv's efficient_conv_bn_eval calls this one directly.
        return super()._conv_forward(
            self._input_quantizer(input), self.rounded_weight(weight), bias
        )


class _ConvTranspose(QuantLayer, _Upward):
    """What transposed convolutions share; mixed into those of torch.

    The weight has shape (in, out / groups, *kernel), so output channels are its axis 1
    (pytorch-quantization's default is axis 0); with groups, channels of equal index in their group
    share a range.
    """

    weight_axis = 1
    _compute: Callable[..., Tensor]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_quantizers()

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Transposed convolution of an (N, C, ...) tensor; see ``nn.ConvTranspose2d``."""
        output_padding = self._output_padding(  # torch types the arguments as lists only
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            self.weight.dim() - 2,
            self.dilation,  # type: ignore[arg-type]
        )
        return type(self)._compute(
            self._input_quantizer(input),
            self.rounded_weight(self.weight),
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )


@MODELS.register_module()
class QuantConv1d(_Conv, nn.Conv1d):
    """``nn.Conv1d`` with quantized input (per tensor) and weight (per output channel).

    Takes the arguments of ``nn.Conv1d``. In float mode it equals it bit for bit.
    """


@MODELS.register_module()
class QuantConv2d(_Conv, nn.Conv2d):
    """``nn.Conv2d`` with quantized input (per tensor) and weight (per output channel).

    Takes the arguments of ``nn.Conv2d``. In float mode it equals it bit for bit.
    """


@MODELS.register_module()
class QuantConv3d(_Conv, nn.Conv3d):
    """``nn.Conv3d`` with quantized input (per tensor) and weight (per output channel).

    Takes the arguments of ``nn.Conv3d``. In float mode it equals it bit for bit.
    """


@MODELS.register_module()
class QuantConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with quantized input (per tensor) and weight (per output channel).

    Takes the arguments of ``nn.ConvTranspose1d``. In float mode it equals it bit for bit.
    """

    _compute = staticmethod(F.conv_transpose1d)


@MODELS.register_module()
class QuantConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with quantized input (per tensor) and weight (per output channel).

    Takes the arguments of ``nn.ConvTranspose2d``. In float mode it equals it bit for bit.
    """

    _compute = staticmethod(F.conv_transpose2d)


@MODELS.register_module()
class QuantConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with quantized input (per tensor) and weight (per output channel).

    Takes the arguments of ``nn.ConvTranspose3d``. In float mode it equals it bit for bit.
    """

    _compute = staticmethod(F.conv_transpose3d)
