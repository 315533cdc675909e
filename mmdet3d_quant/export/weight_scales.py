"""The least scales of weights in files: none that is zero in FP16 or too small for its bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.core.formats import UINT8
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.layers.base import QuantLayer

#: FP16's least number above zero.
LEAST_HALF = 2.0**-24
#: Largest bias in steps of input times weight scale: half of INT32, the rest is for the products.
MOST_STEPS = 2.0**30
#: A scale is raised for FP16 only up to this share of the layer's largest.
_SHARE = 2.0**-8


def raise_scales(module: nn.Module) -> None:
    """Raises weight ranges whose scales engines cannot hold, in place; call it after folding.

    It is for a copy of the model that is about to be written: ranges in a checkpoint stay, and
    fake quantization does not know of it. The scale of a channel becomes at least

    * ``|bias| / (input scale * 2**30)``. Below that the bias overflows in engines that add it as
      INT32 in steps of input times weight scale. With ``n`` weights in a channel, its products of
      integers sum up to less than ``2**14 * n``, so they are ``n / 2**16`` of the bias at most,
      and rounding them anew moves the output by ``n / 2**24`` of the bias at most: 65 dB for
      4608 weights of the same sign, and some 110 dB for ordinary ones.
    * ``2**-24``, FP16's least number, if all weights of the channel round to zero: its integers
      are zero at any scale, and no output changes.
    * ``2**-24`` if the format's least step above zero then is at most 1/256 of the layer's largest
      scale: the channel's rounding errors stay below 1/256 of those in the layer's widest channel.
      In FP8, whose steps grow with the numbers, they otherwise stay what they were.

    All other scales stay, to the bit. Where a whole layer has smaller weights than FP16 can hold
    the scale of, they stay, too; rule Q24 of the linter finds them. Ranges of activations are never
    raised: what small values mean to the layers behind is not known here.

    Args:
        module: A calibrated module, its batch norm folded.
    """
    for layer in module.modules():
        if isinstance(layer, QuantLayer):
            quantizer = layer._weight_quantizer
            if isinstance(quantizer, Quantizer) and quantizer.amax is not None:
                quantizer.amax = raised(layer, quantizer.amax)


def raised(layer: Any, amax: Tensor) -> Tensor:
    """Computes the ranges that :func:`raise_scales` gives the weight of one layer.

    Args:
        layer: The ``QuantLayer``, with its folded weight and bias.
        amax: Its weight ranges, any shape.

    Returns:
        Tensor of the shape and dtype of ``amax``, nowhere less.
    """
    fmt = layer._weight_quantizer.spec.format
    scale = fmt.step(amax.double().flatten())
    weight = layer.weight.detach().double().movedim(layer.weight_axis, 0).flatten(1)
    none = weight.abs().amax(1) <= scale * fmt.least / 2
    small = none | (scale.max() * _SHARE >= LEAST_HALF * fmt.least)
    least = torch.where(small, LEAST_HALF, 0.0).to(scale)
    of_input, bias = layer._input_quantizer, layer.bias
    if bias is not None and isinstance(of_input, Quantizer) and of_input.amax is not None:
        step = UINT8.step(of_input.amax.double())  # the least that a file may have
        steps = bias.detach().double().abs().reshape(-1, len(scale)).amax(0)
        least = torch.maximum(least, steps / step / MOST_STEPS)
    limit = (least * fmt.qmax).to(amax).reshape(amax.shape)
    return torch.where((least > scale).reshape(amax.shape), limit, amax)
