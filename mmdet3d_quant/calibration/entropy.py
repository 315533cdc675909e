"""The range with the least Kullback-Leibler divergence, as pytorch-quantization defines it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import rel_entr

from mmdet3d_quant.calibration.bins import START_BIN, Bins, Device, columns, parts
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.formats import Format

#: How far float64 moves a divergence from its exact value, in nats.
_NATS = 1e-10


def least_divergence(batch: list[Bins], fmt: Format, device: Device) -> list[float]:
    """Searches the bin edge with the least Kullback-Leibler divergence as range.

    A candidate of i bins compares the histogram clipped at i (the counts beyond are added to the
    last bin) with the same bins after merging them into the format's levels, the counts of a
    level spread evenly over its non-empty bins. A level is a pair of bins, where it starts and
    ends, and most pairs occur in many candidates: sums over a pair come from cumulative sums,
    sums over a candidate's levels from the distinct pairs.
    """
    levels = fmt.num_levels()
    longest = max(len(b.counts) for b in batch)
    i = torch.arange(START_BIN, longest + 1, device=device)
    # Bin j belongs to level floor(j * levels / i): level l starts at bin ceil(l * i / levels).
    starts = -(-torch.arange(levels + 1, device=device) * i[:, None] // levels)
    pairs = starts[:, :-1] * (longest + 1) + starts[:, 1:]
    pairs, pair_of = torch.unique(pairs, return_inverse=True)
    begin, end = pairs // (longest + 1), pairs % (longest + 1)
    result = []
    for part in parts(batch, len(pairs)):
        # The first bin is that of exact zeros, which quantize exactly: they must not dominate.
        histograms = [np.r_[b.counts[1], b.counts[1:]] for b in part]
        bins = columns(histograms, longest, device)
        outside = torch.tensor([b.beyond.number for b in part], dtype=bins.dtype, device=device)
        count_to, total = bins.cumsum(0), bins.sum(0) + outside
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
            best = _settle_entropy(counts, levels, row, b.beyond.number)
            result.append(float(b.edges[best]))
    return result


def _settle_entropy(
    bins: np.ndarray, levels: int, divergence: np.ndarray, beyond: float = 0.0
) -> int:
    """Chooses the (last) candidate with the least divergence in the library's arithmetic.

    Args:
        bins: Counts, shape (n,).
        levels: Number of levels.
        divergence: Approximate divergence of the candidates of 128 to n bins (and more).
        beyond: Number of values beyond the last bin.

    Returns:
        Number of bins, 128 to n.
    """
    divergence = divergence[: len(bins) + 1 - START_BIN]
    near = START_BIN + np.flatnonzero(divergence <= divergence.min() + _NATS)
    if len(near) == 1:
        return int(near[0])
    if not bins.any():
        return len(bins)
    exact = np.array([_divergence(bins, i, levels, beyond) for i in near])
    return int(near[np.flatnonzero(exact == exact.min())[-1]])


def _divergence(bins: np.ndarray, i: int, levels: int, beyond: float) -> float:
    """Computes the divergence for the first i bins, summed as ``scipy.stats.entropy`` sums."""
    level = np.arange(i) * levels // i
    filled = bins[:i] > 0
    count = np.bincount(level, bins[:i], levels)
    mean = count / np.maximum(np.bincount(level, filled, levels), 1)
    clipped, merged = bins[:i].copy(), np.where(filled, mean[level], 0.0)
    clipped[-1] += bins[i:].sum() + beyond
    return float(rel_entr(clipped / clipped.sum(), merged / merged.sum()).sum())
