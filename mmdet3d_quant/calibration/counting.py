"""Counting absolute values into bins per octave, on a CPU in one pass over memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numba
import numpy as np
import torch
from torch import Tensor

from mmdet3d_quant.core import fused

if fused.AVAILABLE:
    from mmdet3d_quant.core import kernels
    from mmdet3d_quant.core.launch import launch

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
#: Tables that programs on a GPU share, as increments at one address wait for each other; values
#: that one counts, and most that all tables, of 32 bits, count.
_TABLES, _PROGRAM, _PART = 16, 4096, 2**30
#: Bins per octave, and their bits; octaves below the limit that have bins of their own.
BITS = 11
PER_OCTAVE = 1 << BITS
OCTAVES = 16
#: All bins: the octaves', and those of what lies below.
BINS = PER_OCTAVE * (OCTAVES + 1)
#: Bits of float32's mantissa that do not tell the bin, and where its exponent starts to count.
_SHIFT, _BIAS = 23 - BITS, 127


def count(x: Tensor, exponent: Tensor) -> Tensor:
    """Counts absolute values in 2048 equal bins per octave below ``2**exponent``.

    An octave is ``[2**k, 2**(k+1))``. Its bins are as wide as float32 tells values apart by the
    first 11 bits of the mantissa, so the bin of a value is a shift of its bits. What lies below
    the lowest octave is counted in 2048 equal bins of that octave's width.

    Args:
        x: float32, one-dimensional, finite, ``|x| < 2**exponent``.
        exponent: int32 with one element, at least -24, on the device of ``x``.

    Returns:
        int64 (2048 * (OCTAVES + 1),), on the device of ``x``, without synchronisation with a GPU:
        the bins from 0 up.
    """
    if fused.AVAILABLE and (x.is_cuda or fused.INTERPRETED):
        return _count_on_gpu(x, exponent)
    if x.device.type != 'cpu':
        return count_by_histc(x, exponent)
    return torch.from_numpy(_count(x.numpy(), int(exponent)))


def _count_on_gpu(x: Tensor, exponent: Tensor) -> Tensor:
    """Counts on a GPU in one pass over memory."""
    totals = []
    for part in x.contiguous().split(_PART):
        tables = torch.zeros((_TABLES, BINS), dtype=torch.int32, device=x.device)
        grid = (-(-part.numel() // _PROGRAM),)
        launch(kernels.count, grid, part, exponent, tables, part.numel(), _TABLES, _PROGRAM)
        totals.append(tables.sum(0))
    return totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)


def count_by_histc(x: Tensor, exponent: Tensor) -> Tensor:
    """Counts by torch alone, on any device; see :func:`count`."""
    total = torch.zeros(BINS, dtype=torch.int64, device=x.device)
    # the lowest octaves may lie below the smallest normal float32: scale up by a power of two
    lowest = exponent - OCTAVES
    for chunk in x.split(_CHUNK):
        units = torch.ldexp(chunk.abs().double(), BITS - lowest)
        octave = (torch.frexp(units).exponent - (BITS + 1)).clamp(min=0)
        bins = torch.ldexp(units, -octave).floor() + octave * PER_OCTAVE
        total += torch.histc(bins.float(), BINS, 0, BINS).long()
    return total


def _count(x: np.ndarray, exponent: int) -> np.ndarray:
    """Counts parts of the values in threads and adds up their tables."""
    threads = max(1, min(torch.get_num_threads(), len(x) // _SHARE))
    parts = np.array_split(x, max(threads, -(-len(x) // _MOST)))
    lowest = exponent - OCTAVES
    # from here on the bits of a value tell its bin
    first = np.int32(((lowest + _BIAS) << BITS) - PER_OCTAVE)
    scale = np.float32(2.0 ** (BITS - lowest))

    def of(part: np.ndarray) -> np.ndarray:
        return _count_part(part, part.view(np.int32), scale, np.float32(2.0**lowest), first)

    if len(parts) == 1:
        return of(x)
    return np.sum(list(_pool(threads).map(of, parts)), axis=0)


@lru_cache(maxsize=None)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, 'histogram')


@numba.njit(nogil=True, cache=True)
def _count_part(x, bits, scale, low, first):
    """Counts one part; computes bins block by block first, which the compiler vectorises."""
    table = np.zeros(BINS + _ZEROS, np.uint32)
    bins = np.empty(_BLOCK, np.int32)
    for start in range(0, len(x), _BLOCK):
        values, integers = x[start : start + _BLOCK], bits[start : start + _BLOCK]
        for k in range(len(values)):  # every step in 32 bits, or the compiler takes 64
            magnitude = np.int32(integers[k] & np.int32(0x7FFFFFFF))
            index = np.int32(np.int32(magnitude >> np.int32(_SHIFT)) - first)
            value = abs(values[k])
            below = np.int32((value if value < low else low) * scale)
            bins[k] = index if index > below else below
        for k in range(len(values)):
            place = bins[k] if bins[k] > 0 else BINS + (k & (_ZEROS - 1))
            table[np.uint32(place)] += np.uint32(1)
    counts = table[:BINS].astype(np.int64)
    counts[0] += table[BINS:].sum()
    return counts
