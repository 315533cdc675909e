"""Histograms as the searches for ranges take them."""

from __future__ import annotations

from typing import Iterator, NamedTuple, Union

import numpy as np
import torch
from torch import Tensor

from mmdet3d_quant.calibration.histogram import Beyond

#: No value lies beyond.
NOTHING = Beyond(0.0, 0.0, 0.0)
Device = Union[torch.device, str, None]

#: The smallest candidate range, in bins, that entropy and mse consider (as pytorch-quantization).
START_BIN = 128
#: Elements of the largest tables, which bounds memory (float64: 16 MiB each).
_ELEMENTS = 2**21


class Bins(NamedTuple):
    """A histogram of absolute values: counts (n,) and ascending edges (n + 1,), both float64.

    ``beyond`` are the values that are larger than the last edge; any range here clips them.
    """

    counts: np.ndarray
    edges: np.ndarray
    beyond: Beyond = NOTHING


def checked(counts: np.ndarray, edges: np.ndarray, beyond: Beyond = NOTHING) -> Bins:
    counts, edges = np.asarray(counts, np.float64), np.asarray(edges, np.float64)
    n = len(counts)
    if counts.shape != (n,) or edges.shape != (n + 1,) or n == 0:
        raise ValueError(f'expected n counts and n + 1 edges, got {counts.shape}, {edges.shape}')
    even = edges[0] + np.arange(n + 1) * ((edges[-1] - edges[0]) / n)
    if not (edges[0] >= 0 and (np.abs(edges - even) <= 1e-6 * even).all()):
        raise ValueError(f'expected equally spaced edges from 0 up, got {edges[:3]} ...')
    return Bins(counts, edges, beyond)


def origin(bins: Bins) -> float:
    """Start of the first bin, in units of a bin's width."""
    return float(bins.edges[0] * len(bins.counts) / (bins.edges[-1] - bins.edges[0]))


def columns(histograms: list[np.ndarray], longest: int, device: Device) -> Tensor:
    """Stacks counts as columns, float64 (longest + 1, number): a zero first, zeros to fill up."""
    table = np.zeros((longest + 1, len(histograms)))
    for column, counts in enumerate(histograms):
        table[1 : len(counts) + 1, column] = counts
    return torch.from_numpy(table).to(device)


def parts(batch: list[Bins], size: int) -> Iterator[list[Bins]]:
    """Splits a batch into parts whose tables, ``size`` elements each, fit ``_ELEMENTS``."""
    number = max(1, _ELEMENTS // size)
    return (batch[start : start + number] for start in range(0, len(batch), number))
