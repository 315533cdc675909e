"""Counting absolute values into bins, on a CPU in one pass over memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numba
import numpy as np
import torch
from torch import Tensor

#: A thread gets no less than so many values.
_SHARE = 2**16
#: Bin 0 is kept in so many places, a power of two: half of what follows a ReLU falls into it, and
#: an increment waits for the one before at the same place.
_ZEROS = 64
_BLOCK = 1024
#: No more values per share: tables count in 32 bits.
_MOST = 2**31
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
    parts = np.array_split(x, max(threads, -(-len(x) // _MOST)))
    if len(parts) == 1:
        return _count_part(x, scale, num_bins)
    return sum(_pool(threads).map(lambda part: _count_part(part, scale, num_bins), parts))


@lru_cache(maxsize=None)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, 'histogram')


@numba.njit(nogil=True, cache=True)
def _count_part(x, scale, num_bins):
    """One thread's share. Bins first, block by block, which compiles to vector instructions."""
    table = np.zeros(num_bins + _ZEROS, np.uint32)
    bins = np.empty(_BLOCK, np.int32)
    blocks = len(x) // _BLOCK
    for block in range(blocks):
        start = block * _BLOCK
        for k in range(_BLOCK):
            found = np.int32(abs(x[start + k]) * scale)
            bins[k] = found if found > 0 else num_bins + (k & (_ZEROS - 1))
        for k in range(_BLOCK):
            table[np.uint32(bins[k])] += np.uint32(1)
    for i in range(blocks * _BLOCK, len(x)):
        table[np.uint32(np.int32(abs(x[i]) * scale))] += np.uint32(1)
    counts = table[:num_bins].astype(np.int64)
    counts[0] += table[num_bins:].sum()
    return counts
