"""The range that a method chooses from a histogram."""

from __future__ import annotations

import numpy as np
import torch

from mmdet3d_quant.spec import Method, QuantSpec

#: The smallest candidate range, in bins, that entropy and mse consider (as pytorch-quantization).
_START_BIN = 128


def search_amax(
    hist: np.ndarray, edges: np.ndarray, method: str | Method, spec: QuantSpec | None = None
) -> float:
    """Range that ``method`` chooses for a histogram of absolute values.

    The definitions are pytorch-quantization's (``calib/histogram.py``), so the same histogram
    gives the same range; the search here is vectorised.

    Args:
        hist: Counts, shape (n,).
        edges: Bin edges, ascending from 0, shape (n + 1,).
        method: ``max``, ``percentile``, ``entropy`` or ``mse``.
        spec: The grid; its number of bits matters to ``entropy`` and ``mse``.

    Returns:
        amax, >= 0.

    Raises:
        ValueError: If the method is unknown.
    """
    method = Method.parse(method)
    spec = spec or QuantSpec()
    hist = np.asarray(hist, dtype=np.float64)
    edges = np.asarray(edges, dtype=np.float64)
    if method.name == 'percentile':
        return _percentile(hist, edges, method.percentile)
    if method.name == 'max' or len(hist) <= _START_BIN:
        return float(edges[-1])
    return _entropy(hist, edges, spec) if method.name == 'entropy' else _mse(hist, edges, spec)


def _percentile(hist: np.ndarray, edges: np.ndarray, percentile: float) -> float:
    """Lower edge of the first bin up to whose end ``percentile`` percent of the counts lie."""
    cdf = np.cumsum(hist / hist.sum())
    return float(edges[min(int(np.searchsorted(cdf, percentile / 100)), len(hist))])


def _mse(hist: np.ndarray, edges: np.ndarray, spec: QuantSpec) -> float:
    """Bin centre that, as range, gives the least squared error of the bin centres."""
    centers = torch.from_numpy((edges[1:] + edges[:-1]) / 2).float()
    counts = torch.from_numpy(hist).float()
    errors = []
    for amax in centers[_START_BIN:].split(256):  # bounds the (candidates, bins) table
        scale = spec.qmax / amax[:, None]
        rounded = (centers * scale).round_().clamp_(max=spec.qmax).div_(scale)
        errors.append(rounded.sub_(centers).square_() @ counts)
    return float(centers[_START_BIN + int(torch.cat(errors).argmin())])


def _entropy(hist: np.ndarray, edges: np.ndarray, spec: QuantSpec) -> float:
    """Bin edge that, as range, gives the least Kullback-Leibler divergence.

    A candidate of i bins compares the histogram clipped at i (the counts beyond are added to the
    last bin) with the same bins after merging them into ``2**(b-1)`` levels, the counts of a
    level spread evenly over its non-empty bins. All the sums over bins come from cumulative
    sums at the level boundaries, so that the cost of a candidate is its number of levels.
    """
    bins = hist.copy()
    bins[0] = bins[1]  # exact zeros quantize exactly: they must not dominate
    total = bins.sum()
    if total == 0:
        return float(edges[-1])
    levels = spec.qmax + 1
    zero = np.zeros(1)
    count_to = np.concatenate([zero, np.cumsum(bins)])
    filled_to = np.concatenate([zero, np.cumsum(bins != 0)])
    plogp_to = np.concatenate([zero, np.cumsum(_xlogx(bins))])

    i = np.arange(_START_BIN, len(bins) + 1)
    # Bin j belongs to level floor(j * levels / i): level l starts at bin ceil(l * i / levels).
    starts = -(-np.arange(levels + 1) * i[:, None] // levels)
    level_count = np.diff(count_to[starts], axis=1)
    level_filled = np.diff(filled_to[starts], axis=1)
    with np.errstate(divide='ignore', invalid='ignore'):
        log_mean = np.where(level_count > 0, np.log(level_count / level_filled), 0.0)
        # sum p log p and sum p log q, for p before and after the outliers join the last bin
        last, outliers = bins[i - 1], total - count_to[i]
        plogp = plogp_to[i] - _xlogx(last) + _xlogx(last + outliers)
        last_mean = np.where(last > 0, log_mean[:, -1], -np.inf)
        joined = np.where(outliers > 0, outliers * last_mean, 0.0)
        plogq = (level_count * log_mean).sum(1) + joined
        divergence = (plogp - plogq) / total + np.log(count_to[i] / total)
    divergence[~np.isfinite(divergence)] = np.inf
    last_best = len(divergence) - 1 - int(np.argmin(divergence[::-1]))
    return float(edges[_START_BIN + last_best])


def _xlogx(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.where(x > 0, x, 1.0))
