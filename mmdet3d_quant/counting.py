"""Counting absolute values into bins, on a CPU in one pass over memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

#: A thread gets no less than so many values.
_SHARE = 2**16
#: Tables per thread: equal values in a row do not wait for each other's increment.
_TABLES = 4
#: histc counts in float32: chunks of this size keep every count exact.
_CHUNK = 2**24


def count(x: Tensor, exponent: Tensor, num_bins: int) -> Tensor:
    """Histogram of absolute values over ``[0, 2**exponent)``.

    Args:
        x: float32, one-dimensional, finite, ``|x| < 2**exponent``.
        exponent: int32 with one element, on the device of ``x``.
        num_bins: Number of bins, a power of two.

    Returns:
        int64 (num_bins,), on the device of ``x``; there is no synchronisation with a GPU.
    """
    bits = num_bins.bit_length() - 1
    if x.device.type != 'cpu':
        return count_by_histc(x, bits - exponent, num_bins)
    scale = np.float32(2.0 ** (bits - int(exponent)))
    return torch.from_numpy(_count(x.numpy(), scale, num_bins))


def count_by_histc(x: Tensor, shift: Tensor, num_bins: int) -> Tensor:
    """What :func:`count` does, by torch alone; ``|x| * 2**shift`` are the bins."""
    bins = torch.ldexp(x.abs(), shift)
    total = torch.zeros(num_bins, dtype=torch.int64, device=x.device)
    for chunk in bins.split(_CHUNK):
        total += torch.histc(chunk, num_bins, 0, num_bins).long()
    return total


def _count(x: np.ndarray, scale: np.float32, num_bins: int) -> np.ndarray:
    """Shares the values among threads."""
    threads = max(1, min(torch.get_num_threads(), len(x) // _SHARE))
    if threads == 1:
        return _count_part(x, scale, num_bins)
    parts = np.array_split(x, threads)
    return sum(_pool(threads).map(lambda part: _count_part(part, scale, num_bins), parts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, 'histogram')


@numba.njit(nogil=True, cache=True)
def _count_part(x, scale, num_bins):
    tables = np.zeros((_TABLES, num_bins), np.int64)
    whole = len(x) // _TABLES * _TABLES
    for i in range(0, whole, _TABLES):
        for k in range(_TABLES):
            tables[k, np.int32(abs(x[i + k]) * scale)] += 1
    for i in range(whole, len(x)):
        tables[0, np.int32(abs(x[i]) * scale)] += 1
    return tables.sum(0)
