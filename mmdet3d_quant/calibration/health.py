"""Health of ranges: SQNR, clipping and warning flags, estimated from histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from mmdet3d_quant.calibration.histogram import Histogram
from mmdet3d_quant.core.decibels import decibels
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.core.spec import QuantSpec

#: Sample points per bin: with few bins per quantization step, the centre alone is too coarse.
_PLACES = 8
#: Beyond these a range gets a warning.
LEAST_SQNR, MOST_CLIPPED, MOST_UNSTEADY = 15.0, 0.01, 16.0


@dataclass(frozen=True)
class Health:
    """One tensor under one range.

    Attributes:
        sqnr: Power of the tensor over the power of its quantization error, dB; estimated from
            the histogram. Infinity where there is no error, NaN for a tensor of zeros.
        clipped: Share of the values beyond the range, 0 to 1.
        unsteady: Largest over smallest peak of the tensors seen, >= 1.
        flags: What is odd: ``dead``, ``constant``, ``unsteady``, ``clipped``, ``noisy``.
    """

    sqnr: float
    clipped: float
    unsteady: float
    flags: tuple[str, ...] = field(default=())


def examine(histogram: Histogram, amax: float, spec: QuantSpec) -> Health:
    """Computes the health of a quantizer's inputs under a range."""
    if histogram.amax == 0:
        return Health(math.nan, 0.0, 1.0, ('dead',))
    sqnr, clipped = fit(histogram, amax, spec)
    least = float(histogram.least_peak)
    unsteady = histogram.amax / least if least > 0 else math.inf
    constant = histogram.num_elements > 1 and float(histogram.lowest) == float(histogram.highest)
    odd = dict(
        constant=constant,
        unsteady=unsteady > MOST_UNSTEADY,
        clipped=clipped > MOST_CLIPPED,
        noisy=sqnr < LEAST_SQNR,
    )
    return Health(sqnr, clipped, unsteady, tuple(name for name, is_odd in odd.items() if is_odd))


def fit(histogram: Histogram, amax: float, spec: QuantSpec) -> tuple[float, float]:
    """Estimates SQNR in dB and share of clipped values, with values spread evenly over each bin.

    The one negative number that the grid has more is not used.
    """
    counts, edges = histogram.trimmed()
    width = edges[1]
    values = edges[:-1, None] + width * (np.arange(_PLACES) + 0.5) / _PLACES
    values = np.minimum(values, histogram.amax)
    step = spec.format.step(torch.tensor(amax, dtype=torch.float64)).item()
    error = (spec.format.rounded(values / step) * step - values) ** 2
    noise = float(counts @ error.mean(1))
    power = float(counts @ (values**2).mean(1))
    clipped = float(counts @ (values > amax).mean(1)) / counts.sum()
    return decibels(power, noise), clipped


def weak_weights(model: nn.Module) -> list[str]:
    """Finds weights and buffers of a model, other than ranges, that have NaN or infinity.

    Returns:
        List of str, one message per tensor.
    """
    ranges = {f'{name}._amax' for name in quantizers(model)}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    messages = []
    for name, tensor in tensors.items():
        if name not in ranges and tensor.is_floating_point():
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                messages.append(f'{name}: {bad} of {tensor.numel()} values are NaN or infinite')
    return messages


def dead(health: Sequence[tuple[str, Health]]) -> list[str]:
    """Names of tensors that were zero throughout."""
    return [name for name, h in health if 'dead' in h.flags]
