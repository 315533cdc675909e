"""Ranges of activations whose scales FP16 has, as strongly typed files hold them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdet3d_quant.core.formats import Format
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.layers.base import QuantLayer


def round_ranges(module: nn.Module) -> None:
    """Rounds the scales of activations to the nearest FP16 numbers, in place.

    What the module computes afterwards is what a strongly typed file computes, which holds these
    scales. Weights are left to the file, where their integers stay and only the scales move.
    Ranges whose scale FP16 does not have at all, zero or infinite, stay; the exporter refuses them.

    Args:
        module: A module with calibrated quantizers; others stay.
    """
    of_weights = {id(m._weight_quantizer) for m in module.modules() if isinstance(m, QuantLayer)}
    for quantizer in quantizers(module).values():
        if quantizer.amax is not None and id(quantizer) not in of_weights:
            quantizer.amax = half_range(quantizer.amax, quantizer.spec.format)


def half_range(amax: Tensor, fmt: Format) -> Tensor:
    """Computes the range whose scale is that of ``amax`` rounded to FP16; exact in float32.

    Args:
        amax: Ranges, float32, any shape.
        fmt: Their number format.

    Returns:
        Tensor of the shape and dtype of ``amax``.
    """
    scale = fmt.step(amax).to(torch.float16).to(amax)
    there = (scale > 0) & torch.isfinite(scale)
    return torch.where(there, scale * fmt.qmax, amax)
