"""The range with the least squared error, as pytorch-quantization defines it."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from mmdet3d_quant.calibration.bins import START_BIN, Bins, Device, columns, origin, parts
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.formats import MIN_AMAX, Format

#: How far float32 moves a quantized value from its exact place, relative to the value.
_ROUNDING = 8 * 2.0**-24
#: Ranges from ``2**30`` on are scaled down before they are squared and counted in float32.
_LARGE = 30


def least_squared_error(batch: list[Bins], fmt: Format, device: Device) -> list[float]:
    """Searches the bin centre with the least squared quantization error as range.

    With sums over all centres u, in units of a bin's width, and K(u) the level that u is rounded
    to, the error is sum u^2 - 2 step sum K u + step^2 sum K^2. Halfway between two levels is a
    threshold; K is the sum of the level's rise over the thresholds below u, and K^2 that of the
    rise of its square (1 and 2 k - 1 for integers k): so the sums are sums over thresholds of what
    lies beyond, whose places are the same for all histograms that start alike.
    """
    longest = max(len(b.counts) for b in batch)
    centers = torch.arange(longest, dtype=torch.float64, device=device) + origin(batch[0]) + 0.5
    step = centers[START_BIN:, None] / fmt.qmax
    levels = fmt.levels().to(device)
    thresholds = (levels[1:] + levels[:-1]) / 2
    begin = (thresholds * step - centers[0]).ceil().clamp(0, longest).long()
    rise, rise_of_square = (x.diff().expand(begin.shape) for x in (levels, levels.square()))
    result = []
    for part in parts(batch, longest):
        counts = columns([b.counts for b in part], longest, device)
        moments = counts[1:] * centers[:, None]
        energy = (moments * centers[:, None]).sum(0)
        moments = F.pad(moments, (0, 0, 1, 0))
        beyond = [x.sum(0) - x.cumsum(0) for x in (counts, moments)]
        count, moment = (
            F.embedding_bag(begin, table, mode='sum', per_sample_weights=weights)
            for table, weights in strict_zip(beyond, (rise_of_square, rise))
        )
        errors = count.mul_(step).sub_(moment, alpha=2)
        rows = errors.mul_(step).add_(energy).T.cpu().numpy()
        for b, row, norm in strict_zip(part, rows, energy.tolist()):
            if b.beyond.number:
                result.append(_with_clipped(b, row))
            else:
                result.append(_settle_mse(b, fmt, row, norm))
    return result


def _with_clipped(bins: Bins, errors: np.ndarray) -> float:
    """Chooses the bin centre with the least error where values beyond are clipped to it, too."""
    edges, (number, total, squares) = bins.edges, bins.beyond
    amax = ((edges[1:] + edges[:-1]) / 2)[START_BIN:]
    inside = errors[: len(amax)] * (edges[1] - edges[0]) ** 2
    return float(amax[np.argmin(inside + (number * amax - 2 * total) * amax + squares)])


def _settle_mse(bins: Bins, fmt: Format, errors: np.ndarray, energy: float) -> float:
    """Chooses the candidate with the least error in the library's float32 arithmetic.

    Rounding moves every quantized centre by less than ``_ROUNDING`` of itself, so by the triangle
    inequality the root of an error moves by less than that times the root of the energy; only
    candidates within twice that of the least need the float32 arithmetic.

    Args:
        bins: The histogram, n bins.
        fmt: The numbers of the grid.
        errors: Sum of squared errors for the ranges at centres 128 to n - 1 (and more), in units
            of a bin's width, float64.
        energy: Sum of the squared centres, in the same units.

    Returns:
        amax, a bin centre.
    """
    # Squares of float32's largest values overflow: a power of two, which rounds nothing.
    unit = 2.0 ** max(0, math.frexp(bins.edges[-1])[1] - _LARGE)
    edges, counts = (bins.edges / unit).astype(np.float32), bins.counts.astype(np.float32)
    centers = (edges[1:] + edges[:-1]) / 2
    amax = centers[START_BIN:]
    errors = np.where(amax > MIN_AMAX, errors[: len(amax)], energy).clip(0)
    limit = np.sqrt(errors.min()) * (1 + 2e-6) + 2 * _ROUNDING * np.sqrt(energy)
    near = amax[errors <= limit**2]
    if len(near) == 1:
        return float(near[0]) * unit
    return unit * float(near[np.argmin([_mean_error(centers, counts, a, fmt) for a in near])])


def _mean_error(centers: np.ndarray, counts: np.ndarray, amax: np.float32, fmt: Format) -> float:
    """Computes the mean of count times squared error over all bins, in float32, as torch does."""
    scale = np.float32(fmt.qmax) / amax
    quantized = fmt.rounded(centers * scale) / scale if amax > MIN_AMAX else np.zeros_like(centers)
    return float(torch.from_numpy((quantized - centers) ** 2 * counts).mean())
