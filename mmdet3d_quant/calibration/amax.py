"""Range search on histograms by ``max``, ``percentile``, ``entropy`` or ``mse``, in batches.

The definitions are pytorch-quantization's (``calib/histogram.py``), and so are the results. Every
candidate is scored in float64 on any device, in a form that costs little for many histograms;
those within rounding of the best are then scored again with the library's own arithmetic, whose
rounding decides between them.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Union

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import rel_entr
from torch import Tensor

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.spec import MIN_AMAX, Method, QuantSpec

Device = Union[torch.device, str, None]

#: The smallest candidate range, in bins, that entropy and mse consider (as pytorch-quantization).
_START_BIN = 128
#: Elements of the largest tables, which bounds memory (float64: 16 MiB each).
_ELEMENTS = 2**21
#: How far float32 moves a quantized value from its exact place, relative to the value.
_ROUNDING = 8 * 2.0**-24
#: How far float64 moves a divergence from its exact value, in nats.
_NATS = 1e-10


class Bins(NamedTuple):
    """A histogram of absolute values: counts (n,) and ascending edges (n + 1,), both float64."""

    counts: np.ndarray
    edges: np.ndarray


#: Ranges of histograms: all of one method, each with its grid, on a device.
Search = Callable[[List[Bins], Method, List[QuantSpec], Device], List[float]]


def search_amax(
    hist: np.ndarray,
    edges: np.ndarray,
    method: str | Method,
    spec: QuantSpec | None = None,
    device: Device = None,
) -> float:
    """Searches the range of one histogram; see :func:`search_many`.

    Args:
        hist: Counts, shape (n,).
        edges: Bin edges, ascending from 0 in equal steps, shape (n + 1,).
        method: ``max``, ``percentile``, ``entropy`` or ``mse``.
        spec: The grid; its number of bits matters to ``entropy`` and ``mse``.
        device: Where to search.

    Returns:
        amax, >= 0.

    Raises:
        ValueError: As :func:`search_many`.
    """
    return search_many([(hist, edges)], method, spec, device)[0]


def search_many(
    histograms: Sequence[tuple[np.ndarray, np.ndarray]],
    method: str | Method,
    spec: QuantSpec | Sequence[QuantSpec] | None = None,
    device: Device = None,
) -> list[float]:
    """Searches the range of each histogram.

    Ranges are those of pytorch-quantization, with two exceptions where its result comes from NaN:

    - ``entropy``: a range without counts inside (bin 0 aside) has no divergence, and the library
      takes the largest such range. They exist where bins 1 to 127 are empty and others are not.
      Here the best of the rest is taken.
    - ``mse``: squared errors, times counts, that overflow float32 (values from about 1e18).

    By ``entropy`` and ``mse``, a histogram of 128 bins or less gets its last edge; the library has
    no candidates there. The result does not depend on the device.

    Args:
        histograms: Pairs of counts (n,) and bin edges (n + 1,), which ascend from about 0 in
            equal steps. Lengths may differ.
        method: ``max``, ``percentile``, ``entropy`` or ``mse``.
        spec: The grid of all, or one per histogram; INT8 by default.
        device: Where to search; on the CPU by default.

    Returns:
        List of float, one amax >= 0 per histogram.

    Raises:
        ValueError: If the method is unknown or needs more than a histogram (``auto``), if the
            numbers of specs, counts or edges do not fit, or if the edges are not equally spaced.
    """
    method = Method.parse(method)
    if method.name not in SEARCHES:
        raise ValueError(f'expected {", ".join(SEARCHES)} for a histogram, got {method.name}')
    bins = [_checked(counts, edges) for counts, edges in histograms]
    spec = QuantSpec() if spec is None else spec
    specs = [spec] * len(bins) if isinstance(spec, QuantSpec) else list(spec)
    if len(specs) != len(bins):
        raise ValueError(f'expected one spec per histogram ({len(bins)}), got {len(specs)}')
    return SEARCHES[method.name](bins, method, specs, device)


def _max(bins: list[Bins], *_: Any) -> list[float]:
    """Upper edge of the last bin."""
    return [float(b.edges[-1]) for b in bins]


def _by_grid(search: Callable[[list[Bins], int, Device], list[float]]) -> Search:
    """A search of many histograms that share grid and origin, for any histograms."""

    def run(bins: list[Bins], method: Method, specs: list[QuantSpec], device: Device):
        result = _max(bins)  # what has no candidates keeps all
        groups: dict[tuple[int, float], list[int]] = {}
        for i, b in enumerate(bins):
            if len(b.counts) > _START_BIN and b.edges[-1] > b.edges[0]:
                groups.setdefault((specs[i].qmax, _origin(b)), []).append(i)
        for (qmax, _), members in groups.items():
            for i, amax in strict_zip(members, search([bins[i] for i in members], qmax, device)):
                result[i] = amax
        return result

    return run


def _checked(counts: np.ndarray, edges: np.ndarray) -> Bins:
    counts, edges = np.asarray(counts, np.float64), np.asarray(edges, np.float64)
    n = len(counts)
    if counts.shape != (n,) or edges.shape != (n + 1,) or n == 0:
        raise ValueError(f'expected n counts and n + 1 edges, got {counts.shape}, {edges.shape}')
    even = edges[0] + np.arange(n + 1) * ((edges[-1] - edges[0]) / n)
    if not (edges[0] >= 0 and (np.abs(edges - even) <= 1e-6 * even).all()):
        raise ValueError(f'expected equally spaced edges from 0 up, got {edges[:3]} ...')
    return Bins(counts, edges)


def _origin(bins: Bins) -> float:
    """Start of the first bin, in units of a bin's width."""
    return float(bins.edges[0] * len(bins.counts) / (bins.edges[-1] - bins.edges[0]))


def _percentiles(bins: list[Bins], method: Method, *_: Any) -> list[float]:
    return [_percentile(b, method.percentile) for b in bins]


def _percentile(bins: Bins, percentile: float) -> float:
    """Lower edge of the first bin up to whose end ``percentile`` percent of the counts lie."""
    total = bins.counts.sum()
    if total == 0:
        return float(bins.edges[0])
    cdf = np.cumsum(bins.counts / total)
    return float(bins.edges[np.searchsorted(cdf, percentile / 100)])


def _columns(histograms: list[np.ndarray], longest: int, device: Device) -> Tensor:
    """Stacks counts as columns, float64 (longest + 1, number): a zero first, zeros to fill up."""
    table = np.zeros((longest + 1, len(histograms)))
    for column, counts in enumerate(histograms):
        table[1 : len(counts) + 1, column] = counts
    return torch.from_numpy(table).to(device)


def _parts(batch: list[Bins], size: int) -> Iterator[list[Bins]]:
    """Splits a batch into parts whose tables, ``size`` elements each, fit ``_ELEMENTS``."""
    number = max(1, _ELEMENTS // size)
    return (batch[start : start + number] for start in range(0, len(batch), number))


def _mse(batch: list[Bins], qmax: int, device: Device) -> list[float]:
    """Searches the bin centre with the least squared quantization error as range.

    With sums over all centres u, in units of a bin's width, and K(u) the level that u is rounded
    to, the error is sum u^2 - 2 step sum K u + step^2 sum K^2. K is the number of thresholds
    (k - 1/2) step below u, and K^2 the sum of 2 k - 1 over them: so the sums are sums over
    thresholds of what lies beyond, whose places are the same for all histograms that start alike.
    """
    longest = max(len(b.counts) for b in batch)
    centers = torch.arange(longest, dtype=torch.float64, device=device) + _origin(batch[0]) + 0.5
    step = centers[_START_BIN:, None] / qmax
    k = torch.arange(1, qmax + 1, dtype=torch.float64, device=device)
    begin = ((k - 0.5) * step - centers[0]).ceil().clamp(0, longest).long()
    weights = (2 * k - 1).expand(begin.shape)
    result = []
    for part in _parts(batch, longest):
        counts = _columns([b.counts for b in part], longest, device)
        moments = counts[1:] * centers[:, None]
        energy = (moments * centers[:, None]).sum(0)
        moments = F.pad(moments, (0, 0, 1, 0))
        beyond = [x.sum(0) - x.cumsum(0) for x in (counts, moments)]
        errors = F.embedding_bag(begin, beyond[0], mode='sum', per_sample_weights=weights)
        errors = errors.mul_(step).sub_(F.embedding_bag(begin, beyond[1], mode='sum'), alpha=2)
        rows = errors.mul_(step).add_(energy).T.cpu().numpy()
        for b, row, norm in strict_zip(part, rows, energy.tolist()):
            result.append(_settle_mse(b, qmax, row, norm))
    return result


def _settle_mse(bins: Bins, qmax: int, errors: np.ndarray, energy: float) -> float:
    """Chooses the candidate with the least error in the library's float32 arithmetic.

    Rounding moves every quantized centre by less than ``_ROUNDING`` of itself, so by the triangle
    inequality the root of an error moves by less than that times the root of the energy; only
    candidates within twice that of the least need the float32 arithmetic.

    Args:
        bins: The histogram, n bins.
        qmax: Largest integer of the grid.
        errors: Sum of squared errors for the ranges at centres 128 to n - 1 (and more), in units
            of a bin's width, float64.
        energy: Sum of the squared centres, in the same units.

    Returns:
        amax, a bin centre.
    """
    edges, counts = bins.edges.astype(np.float32), bins.counts.astype(np.float32)
    centers = (edges[1:] + edges[:-1]) / 2
    amax = centers[_START_BIN:]
    errors = np.where(amax > MIN_AMAX, errors[: len(amax)], energy).clip(0)
    limit = np.sqrt(errors.min()) * (1 + 2e-6) + 2 * _ROUNDING * np.sqrt(energy)
    near = amax[errors <= limit**2]
    if len(near) == 1:
        return float(near[0])
    return float(near[np.argmin([_mean_error(centers, counts, a, qmax) for a in near])])


def _mean_error(centers: np.ndarray, counts: np.ndarray, amax: np.float32, qmax: int) -> float:
    """Computes the mean of count times squared error over all bins, in float32, as torch does."""
    scale = np.float32(qmax) / amax
    levels = np.minimum(np.rint(centers * scale), np.float32(qmax))
    quantized = levels / scale if amax > MIN_AMAX else np.zeros_like(centers)
    return float(torch.from_numpy((quantized - centers) ** 2 * counts).mean())


def _entropy(batch: list[Bins], qmax: int, device: Device) -> list[float]:
    """Searches the bin edge with the least Kullback-Leibler divergence as range.

    A candidate of i bins compares the histogram clipped at i (the counts beyond are added to the
    last bin) with the same bins after merging them into ``2**(b-1)`` levels, the counts of a
    level spread evenly over its non-empty bins. A level is a pair of bins, where it starts and
    ends, and most pairs occur in many candidates: sums over a pair come from cumulative sums,
    sums over a candidate's levels from the distinct pairs.
    """
    levels = qmax + 1
    longest = max(len(b.counts) for b in batch)
    i = torch.arange(_START_BIN, longest + 1, device=device)
    # Bin j belongs to level floor(j * levels / i): level l starts at bin ceil(l * i / levels).
    starts = -(-torch.arange(levels + 1, device=device) * i[:, None] // levels)
    pairs = starts[:, :-1] * (longest + 1) + starts[:, 1:]
    pairs, pair_of = torch.unique(pairs, return_inverse=True)
    begin, end = pairs // (longest + 1), pairs % (longest + 1)
    result = []
    for part in _parts(batch, len(pairs)):
        # The first bin is that of exact zeros, which quantize exactly: they must not dominate.
        histograms = [np.r_[b.counts[1], b.counts[1:]] for b in part]
        bins = _columns(histograms, longest, device)
        count_to, total = bins.cumsum(0), bins.sum(0)
        filled_to = (bins > 0).double().cumsum(0)
        plogp_to = torch.xlogy(bins, bins).cumsum(0)

        count = count_to[end].sub_(count_to[begin])
        mean = count / filled_to[end].sub_(filled_to[begin]).clamp_(min=1)
        # sum p log p and sum p log q, for p before and after the outliers join the last bin
        plogq = F.embedding_bag(pair_of, torch.xlogy(count, mean), mode='sum')
        last, inside = bins[i], count_to[i]
        joined = last + (total - inside)
        plogp = plogp_to[i] - torch.xlogy(last, last) + torch.xlogy(joined, joined)
        last_mean = mean[pair_of[:, -1]].where(last > 0, 0)
        plogq += torch.xlogy(total - inside, last_mean)
        divergence = (plogp - plogq) / total + (inside / total).log()
        rows = divergence.where(inside > 0, torch.inf).T.cpu().numpy()
        for b, counts, row in strict_zip(part, histograms, rows):
            result.append(float(b.edges[_settle_entropy(counts, levels, row)]))
    return result


def _settle_entropy(bins: np.ndarray, levels: int, divergence: np.ndarray) -> int:
    """Chooses the (last) candidate with the least divergence in the library's arithmetic.

    Args:
        bins: Counts, shape (n,).
        levels: Number of levels.
        divergence: Approximate divergence of the candidates of 128 to n bins (and more).

    Returns:
        Number of bins, 128 to n.
    """
    divergence = divergence[: len(bins) + 1 - _START_BIN]
    near = _START_BIN + np.flatnonzero(divergence <= divergence.min() + _NATS)
    if len(near) == 1:
        return int(near[0])
    if not bins.any():
        return len(bins)
    exact = np.array([_divergence(bins, i, levels) for i in near])
    return int(near[np.flatnonzero(exact == exact.min())[-1]])


def _divergence(bins: np.ndarray, i: int, levels: int) -> float:
    """Computes the divergence for the first i bins, summed as ``scipy.stats.entropy`` sums."""
    level = np.arange(i) * levels // i
    filled = bins[:i] > 0
    count = np.bincount(level, bins[:i], levels)
    mean = count / np.maximum(np.bincount(level, filled, levels), 1)
    clipped, merged = bins[:i].copy(), np.where(filled, mean[level], 0.0)
    clipped[-1] += bins[i:].sum()
    return float(rel_entr(clipped / clipped.sum(), merged / merged.sum()).sum())


#: By the names of ``core.spec.METHODS``; ``auto`` needs more than a histogram.
SEARCHES: Dict[str, Search] = {
    'max': _max,
    'percentile': _percentiles,
    'entropy': _by_grid(_entropy),
    'mse': _by_grid(_mse),
}
