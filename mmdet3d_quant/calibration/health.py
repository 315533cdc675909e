"""Health of ranges: SQNR, clipping and warning flags, estimated from histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mmdet3d_quant.calibration.histogram import Histogram
from mmdet3d_quant.calibration.peaks import Peaks
from mmdet3d_quant.core.decibels import decibels
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.core.spec import QuantSpec

#: Sample points per bin: with few bins per quantization step, the centre alone is too coarse.
_PLACES = 8
#: Beyond these a range gets a warning.
LEAST_SQNR, MOST_CLIPPED, MOST_UNSTEADY = 15.0, 0.01, 16.0
#: The same for the share of values, and of channels, that round to zero, and for the bits that
#: one of several inputs keeps.
MOST_LOST, MOST_LOST_CHANNELS, LEAST_BITS = 0.9, 0.25, 4.0


@dataclass(frozen=True)
class Health:
    """One tensor under one range.

    Attributes:
        sqnr: Power of the tensor over the power of its quantization error, dB; estimated from
            the histogram. Infinity where there is no error, NaN for a tensor of zeros.
        clipped: Share of the values beyond the range, 0 to 1.
        unsteady: Largest over smallest peak of the batches, or of the tensors where batches are
            not known, >= 1.
        flags: What is odd: ``dead``, ``constant``, ``unsteady``, ``clipped``, ``noisy``, ``lost``
            (next to all values round to zero, as after a single large one), ``channels`` (so do
            whole channels), ``narrow`` (one input of an add or concat has few bits left).
        lost: Share of the values other than zero that round to zero.
        lost_channels: Share of the channels with values other than zero whose values all do.
        bits: How many bits the largest value of each tensor of a batch takes, in the order in
            which the quantizer reads them: the inputs of an add or a concat, also of one that
            was joined before it was quantized.
    """

    sqnr: float
    clipped: float
    unsteady: float
    flags: tuple[str, ...] = field(default=())
    lost: float = 0.0
    lost_channels: float = 0.0
    bits: tuple[float, ...] = ()


def examine(
    histogram: Histogram, amax: float, spec: QuantSpec, peaks: Peaks | None = None
) -> Health:
    """Computes the health of a quantizer's inputs under a range.

    Args:
        histogram: Of all its inputs.
        amax: Its range limit.
        spec: Its grid.
        peaks: Largest values of the same inputs by tensor and channel, if known.
    """
    if histogram.amax == 0:
        return Health(math.nan, 0.0, 1.0, ('dead',))
    sqnr, clipped = fit(histogram, amax, spec)
    least = min(map(float, peaks.by_batch.values())) if peaks else float(histogram.least_peak)
    unsteady = histogram.amax / least if least > 0 else math.inf
    constant = histogram.num_elements > 1 and float(histogram.lowest) == float(histogram.highest)
    step = _step(amax, spec)
    fmt = spec.format
    lost = _lost(histogram, step * fmt.least)
    channels = peaks.inputs if peaks else []
    lost_channels = _lost_channels(channels, step * fmt.least)
    bits = tuple(fmt.bits_used(float(p.max()) / step) for p in channels if p.numel())
    odd = dict(
        constant=constant,
        unsteady=unsteady > MOST_UNSTEADY,
        clipped=clipped > MOST_CLIPPED,
        noisy=sqnr < LEAST_SQNR,
        lost=lost > MOST_LOST,
        channels=lost_channels > MOST_LOST_CHANNELS,
        narrow=len(bits) > 1 and min(bits) < min(LEAST_BITS, fmt.bits - 1),
    )
    flags = tuple(name for name, is_odd in odd.items() if is_odd)
    return Health(sqnr, clipped, unsteady, flags, lost, lost_channels, bits)


def _lost(histogram: Histogram, least: float) -> float:
    """Share of the values that round to zero, without those that are (nearly) zero already."""
    counts, values = histogram.bins.cpu().numpy()[1:], histogram.centers()[1:]
    total = counts.sum()
    return float(counts[values < least / 2].sum() / total) if total else 0.0


def _lost_channels(channels: Sequence[Tensor], least: float) -> float:
    """Share of the channels with values other than zero that round to zero as a whole."""
    peaks = torch.cat([p.flatten() for p in channels]) if channels else torch.zeros(0)
    live = peaks[peaks > 0]
    return float((live < least / 2).float().mean()) if len(live) else 0.0


def _step(amax: float, spec: QuantSpec) -> float:
    return spec.format.step(torch.tensor(amax, dtype=torch.float64)).item()


def fit(histogram: Histogram, amax: float, spec: QuantSpec) -> tuple[float, float]:
    """Estimates SQNR in dB and share of clipped values, with values spread evenly over each bin.

    The one negative number that the grid has more is not used.
    """
    counts = histogram.bins.cpu().numpy()
    filled = counts > 0
    counts, center, width = (a[filled] for a in (counts, histogram.centers(), histogram.widths()))
    values = center[:, None] + width[:, None] * ((np.arange(_PLACES) + 0.5) / _PLACES - 0.5)
    values = np.minimum(values, histogram.amax)
    step = _step(amax, spec)
    error = (spec.format.rounded(values / step) * step - values) ** 2
    noise = float(counts @ error.mean(1))
    power = float(counts @ (values**2).mean(1))
    clipped = float(counts @ (values > amax).mean(1)) / counts.sum()
    return decibels(power, noise), clipped


def weak_weights(model: nn.Module) -> list[str]:
    """Finds weights and buffers of a model, other than ranges, that have NaN or infinity.

    Minus infinity in a buffer is none: so attention masks what it shall not see.

    Returns:
        List of str, one message per tensor.
    """
    ranges = {f'{name}._amax' for name in quantizers(model)}
    buffers = dict(model.named_buffers())
    tensors = {**dict(model.named_parameters()), **buffers}
    messages = []
    for name, tensor in tensors.items():
        if name not in ranges and tensor.is_floating_point():
            wrong = ~torch.isfinite(tensor)
            if name in buffers:
                wrong &= tensor != -math.inf
            bad = int(wrong.sum())
            if bad:
                messages.append(f'{name}: {bad} of {tensor.numel()} values are NaN or infinite')
    return messages
