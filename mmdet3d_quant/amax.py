"""Statistics of a tensor, and the range that a method chooses from them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mmdet3d_quant.spec import Method, QuantSpec

NUM_BINS = 4096
#: histc counts in float32: chunks of this size keep every count exact.
_CHUNK = 2**24
#: The smallest candidate range, in bins, that entropy and mse consider (as pytorch-quantization).
_START_BIN = 128


class NonFiniteError(ValueError):
    """A tensor to calibrate on contains NaN or infinity."""


class Histogram:
    """Histogram of absolute values over ``[0, 2**exponent)`` in 4096 bins of equal width.

    The limit is always a power of two and grows by whole doublings, for which bins merge in
    pairs: nothing is lost or interpolated, memory is constant, and neither the order of the
    batches nor how they are split among collectors changes the counts. It takes the place of a
    pytorch-quantization calibrator (``collect``, ``reset``, ``compute_amax``).

    Args:
        name: How errors call the tensor.

    Attributes:
        counts: int64 of shape (4096,).
        exponent: The range is ``2**exponent``; None before the first non-zero value.
        amax: Largest absolute value seen, exact.
        num_elements: Number of values seen.
        num_batches: Number of tensors seen.
    """

    def __init__(self, name: str = 'tensor') -> None:
        self.name = name
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.counts = torch.zeros(NUM_BINS, dtype=torch.int64)
        self.exponent: int | None = None
        self.amax = 0.0
        self.num_elements = 0
        self.num_batches = 0

    def collect(self, x: Tensor) -> None:
        """Adds a tensor.

        Args:
            x: Floating tensor of any shape, dtype and device.

        Raises:
            NonFiniteError: If it contains NaN or infinity; nothing is added then.
        """
        x = x.detach().float().abs().flatten()
        if x.numel() == 0:
            return
        largest = float(x.max())
        if not math.isfinite(largest):
            bad = int((~torch.isfinite(x)).sum())
            raise NonFiniteError(
                f'{self.name} is the first tensor with NaN or infinity ({bad} of {x.numel()} '
                'values): check the input data and the weights before this layer'
            )
        if largest > 0:
            # frexp: largest = m * 2**e with m in [0.5, 1), so largest < 2**e strictly.
            self._grow(math.frexp(largest)[1])
        limit = 2.0 ** (self.exponent if self.exponent is not None else 0)
        for chunk in x.split(_CHUNK):
            hist = torch.histc(chunk, NUM_BINS, 0, limit)
            self.counts += hist.to('cpu', torch.int64)
        self.amax = max(self.amax, largest)
        self.num_elements += x.numel()
        self.num_batches += 1

    def merge(self, other: Histogram) -> None:
        """Adds the statistics of another histogram, exactly; ``other`` is not changed."""
        counts = other.counts
        if other.exponent is not None:
            counts = _coarsen(counts, self._grow(other.exponent) - other.exponent)
        self.counts += counts
        self.amax = max(self.amax, other.amax)
        self.num_elements += other.num_elements
        self.num_batches += other.num_batches

    def compute_amax(self, method: str | Method, spec: QuantSpec | None = None) -> float | None:
        """Range by ``method``, None if no tensor was seen; see :func:`search_amax`."""
        if not self.num_batches:
            return None
        method = Method.parse(method)
        if method.name == 'max' or self.exponent is None:
            return self.amax
        hist, edges = self.trimmed()
        return search_amax(hist, edges, method, spec or QuantSpec())

    def trimmed(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts and edges up to the bin that holds the largest value.

        Returns:
            int64 counts of shape (n,) and float64 edges of shape (n + 1,), n <= 4096.
        """
        width = 2.0 ** (self.exponent or 0) / NUM_BINS
        n = min(int(self.amax / width) + 1, NUM_BINS)
        return self.counts[:n].numpy(), np.arange(n + 1) * width

    def _grow(self, exponent: int) -> int:
        """Makes the range at least ``2**exponent``; returns its exponent."""
        if self.exponent is None:  # only zeros so far: they are in bin 0 at any range
            self.exponent = exponent
        if exponent > self.exponent:
            self.counts = _coarsen(self.counts, exponent - self.exponent)
            self.exponent = exponent
        return self.exponent


def _coarsen(counts: Tensor, doublings: int) -> Tensor:
    """Counts of the same values when the range is doubled ``doublings`` times."""
    group = min(2**doublings, NUM_BINS)
    out = torch.zeros_like(counts)
    out[: NUM_BINS // group] = counts.view(-1, group).sum(1)
    return out


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
