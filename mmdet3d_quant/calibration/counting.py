"""Counting absolute values into bins, on a CPU in one pass over memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numba
import numpy as np
import torch
from torch import Tensor

#: Least number of values per thread.
_SHARE = 2**16
#: Number of counters for bin 0, a power of two: half of a ReLU's outputs fall into it, and an
#: increment waits for the one before at the same address.
_ZEROS = 64
_BLOCK = 1024
#: Most values per part: tables count in 32 bits.
_MOST = 2**31
#: histc counts in float32: chunks of this size keep every count exact.
_CHUNK = 2**24


def count(x: Tensor, exponent: Tensor, num_bins: int) -> Tensor:
    """Counts absolute values in equal bins over ``[0, 2**exponent)``.

    Args:
        x: float32, one-dimensional, finite, ``|x| < 2**exponent``.
        exponent: int32 with one element, on the device of ``x``.
        num_bins: Number of bins, a power of two.

    Returns:
        int64 (num_bins,), on the device of ``x``, without synchronisation with a GPU.
    """
    bits = num_bins.bit_length() - 1
    if x.device.type != 'cpu':
        return count_by_histc(x, bits - exponent, num_bins)
    scale = np.float32(2.0 ** (bits - int(exponent)))
    return torch.from_numpy(_count(x.numpy(), scale, num_bins))


def count_by_histc(x: Tensor, shift: Tensor, num_bins: int) -> Tensor:
    """Counts by torch alone, on any device; the bin of a value is ``floor(|x| * 2**shift)``."""
    bins = torch.ldexp(x.abs(), shift)
    total = torch.zeros(num_bins, dtype=torch.int64, device=x.device)
    for chunk in bins.split(_CHUNK):
        total += torch.histc(chunk, num_bins, 0, num_bins).long()
    return total


def _count(x: np.ndarray, scale: np.float32, num_bins: int) -> np.ndarray:
    """Counts parts of the values in threads and adds up their tables."""
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
    """Counts one part; computes bins block by block first, which the compiler vectorises."""
    table = np.zeros(num_bins + _ZEROS, np.uint32)
    bins = np.empty(_BLOCK, np.int32)
    blocks = len(x) // _BLOCK
    for block in range(blocks):
        start = block * _BLOCK
        for k in range(_BLOCK):
            index = np.int32(abs(x[start + k]) * scale)
            bins[k] = index if index > 0 else num_bins + (k & (_ZEROS - 1))
        for k in range(_BLOCK):
            table[np.uint32(bins[k])] += np.uint32(1)
    for i in range(blocks * _BLOCK, len(x)):
        table[np.uint32(np.int32(abs(x[i]) * scale))] += np.uint32(1)
    counts = table[:num_bins].astype(np.int64)
    counts[0] += table[num_bins:].sum()
    return counts
