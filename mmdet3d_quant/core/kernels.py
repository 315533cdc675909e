"""Triton kernels of fake quantization on a GPU; imported only where Triton is installed.

Arithmetic is that of a CPU, step by step in float32, so that values and masks have the same bits.

Tensors are dense and seen as memory: elements in the order in which they lie. Where channels
matter, they are either the last in memory (channels last), or planes of ``inner`` elements.

Masks are bits, 32 elements of memory a word.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmdet3d_quant.core.formats import MIN_AMAX

_LEAST = tl.constexpr(MIN_AMAX)
#: 1.5 * 2**23: a float32 below 2**22 plus this, minus this, is rounded, halves to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _rounded(x, amax, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Rounds float32 to the grid of a range (or one for each element)."""
    step = tl.div_rn(tl.maximum(amax, _LEAST, propagate_nan=tl.PropagateNan.ALL), QMAX)
    steps = x * tl.div_rn(1.0, step)
    steps = tl.maximum(steps, QMIN, propagate_nan=tl.PropagateNan.ALL)
    steps = tl.minimum(steps, QMAX, propagate_nan=tl.PropagateNan.ALL)
    return ((steps + _ROUNDER) - _ROUNDER) * step


@triton.jit
def _inside(x, amax, RECTIFY: tl.constexpr):
    """Tells where a gradient passes."""
    if RECTIFY:
        return (x > 0) & (x <= amax)
    else:
        return tl.abs(x) <= amax


@triton.jit
def _normed(x, mean, inverse, gain, shift, dtype):
    """Computes a batch norm of given statistics, rounded to the type that it is stored in."""
    return tl.fma((x - mean) * inverse, gain, shift).to(dtype).to(tl.float32)


@triton.jit
def _sum_with(x, other, at, ok, dtype):
    """Adds a second tensor, in the type that both are stored in."""
    return (x + tl.load(other + at, mask=ok, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _store_bits(bits, word, inside, BLOCK: tl.constexpr):
    """Stores the mask of a block as words, from a given one."""
    lanes = tl.reshape(inside.to(tl.int32), (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
    tl.store(bits + word + tl.arange(0, BLOCK // 32), tl.sum(lanes, axis=1))


@triton.jit
def forward(
    x, y, bits, amax, n,
    QMIN: tl.constexpr, QMAX: tl.constexpr, RECTIFY: tl.constexpr, MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rounds a tensor; stores the mask of its gradient, if asked."""
    pid = tl.program_id(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < n
    value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    limit = tl.load(amax)
    tl.store(y + at, _rounded(value, limit, QMIN, QMAX).to(y.dtype.element_ty), mask=ok)
    if MASK:
        _store_bits(bits, pid * (BLOCK // 32), _inside(value, limit, RECTIFY), BLOCK)


@triton.jit
def backward(grad, bits, grad_x, n, BLOCK: tl.constexpr):
    """Masks a gradient by bits."""
    pid = tl.program_id(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(bits + pid * (BLOCK // 32) + tl.arange(0, BLOCK // 32))
    inside = tl.reshape((words[:, None] >> tl.arange(0, 32)[None, :]) & 1, (BLOCK,))
    value = tl.load(grad + at, mask=at < n, other=0.0)
    tl.store(grad_x + at, tl.where(inside != 0, value, 0.0), mask=at < n)


@triton.jit
def _slope(grad, x, inside, limit, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Computes each element's share in the gradient of the range, before that is scaled."""
    y = _rounded(x, limit, QMIN, QMAX)
    return grad * tl.where(inside, y - x, y)


@triton.jit
def backward_learned(
    grad, x, grad_x, sums, amax, n,
    QMIN: tl.constexpr, QMAX: tl.constexpr, RECTIFY: tl.constexpr, STORE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Masks a gradient by the input, if asked, and sums the gradient of the range by blocks."""
    pid = tl.program_id(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < n
    raw = tl.load(grad + at, mask=ok, other=0.0)
    value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    limit = tl.load(amax)
    inside = _inside(value, limit, RECTIFY)
    if STORE:
        tl.store(grad_x + at, tl.where(inside, raw, 0.0), mask=ok)
    share = _slope(raw.to(tl.float32), value, inside, limit, QMIN, QMAX)
    tl.store(sums + pid, tl.sum(share, axis=0))


@triton.jit
def finish(sums, amax, grad_amax, count, root, BLOCK: tl.constexpr):
    """Sums what blocks have summed, in their order, and scales it to the gradient of a range."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(sums + at, mask=at < count, other=0.0)
    limit = tl.maximum(tl.load(amax), _LEAST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(grad_amax, tl.div_rn(tl.sum(total, axis=0), limit * root))


@triton.jit
def normed_forward(
    x, other, y, bits, amax, mean, var, gain, shift, eps, n, inner,
    CHANNELS: tl.constexpr, PLANES: tl.constexpr, ADD: tl.constexpr, QMIN: tl.constexpr,
    QMAX: tl.constexpr, RECTIFY: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rounds the batch norm of a tensor, plus another if given."""
    if PLANES:
        plane = tl.program_id(0)
        block = tl.program_id(1)
        along = block * BLOCK + tl.arange(0, BLOCK)
        ok = along < inner
        at = plane.to(tl.int64) * inner + along
        channel = plane % CHANNELS
        word = plane.to(tl.int64) * (tl.cdiv(inner, BLOCK) * (BLOCK // 32)) + block * (BLOCK // 32)
    else:
        block = tl.program_id(0)
        at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ok = at < n
        channel = (block % CHANNELS * (BLOCK % CHANNELS) + tl.arange(0, BLOCK)) % CHANNELS
        word = block * (BLOCK // 32)
    inverse = tl.rsqrt(tl.load(var + channel) + eps)
    value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    value = _normed(
        value, tl.load(mean + channel), inverse, tl.load(gain + channel), tl.load(shift + channel),
        x.dtype.element_ty,
    )  # fmt: skip
    if ADD:
        value = _sum_with(value, other, at, ok, x.dtype.element_ty)
    limit = tl.load(amax)
    tl.store(y + at, _rounded(value, limit, QMIN, QMAX).to(y.dtype.element_ty), mask=ok)
    if MASK:
        _store_bits(bits, word, _inside(value, limit, RECTIFY), BLOCK)


@triton.jit
def normed_backward(
    grad, x, other, bits, grad_x, grad_other, sums, amax, mean, var, gain, shift, eps,
    rows, inner, each, words,
    CHANNELS: tl.constexpr, PLANES: tl.constexpr, ADD: tl.constexpr, QMIN: tl.constexpr,
    QMAX: tl.constexpr, RECTIFY: tl.constexpr, MASK: tl.constexpr, LEARNED: tl.constexpr,
    WIDE: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of :func:`normed_forward`.

    A program takes ``WIDE`` channels and ``each`` of their rows, ``LONG`` at a time. Rows are
    pixels where channels are last; else elements of a plane, one of ``rows`` planes at a time.

    ``sums`` is (3, programs along rows, channels): the gradients of gain and shift, and of the
    range before it is scaled.
    """
    part = tl.program_id(1)
    channel = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    known = channel < CHANNELS
    centre = tl.load(mean + channel, mask=known, other=0.0)[None, :]
    inverse = tl.rsqrt(tl.load(var + channel, mask=known, other=1.0) + eps)[None, :]
    factor = tl.load(gain + channel, mask=known, other=0.0)[None, :]
    offset = tl.load(shift + channel, mask=known, other=0.0)[None, :]
    limit = tl.load(amax)
    sum_shift = tl.zeros((LONG, WIDE), tl.float32)
    sum_gain = tl.zeros((LONG, WIDE), tl.float32)
    sum_range = tl.zeros((LONG, WIDE), tl.float32)
    for start in range(0, each, LONG):
        if PLANES:
            row = start + tl.arange(0, LONG)
            plane = part.to(tl.int64) * CHANNELS + channel
            at = plane[None, :] * inner + row[:, None]
            ok = known[None, :] & (row < inner)[:, None]
            word = plane[None, :] * words + (row >> 5)[:, None]
            lane = (row & 31)[:, None]
        else:
            row = part.to(tl.int64) * each + start + tl.arange(0, LONG)
            at = row[:, None] * CHANNELS + channel[None, :]
            ok = known[None, :] & (row < rows)[:, None]
            word = at >> 5
            lane = (at & 31).to(tl.int32)
        centred = (tl.load(x + at, mask=ok, other=0.0).to(tl.float32) - centre) * inverse
        raw = tl.load(grad + at, mask=ok, other=0.0)
        if (MASK and not PLANES) and CHANNELS % WIDE == 0:  # Triton 3.0 wants the brackets
            # A byte holds the bits of eight neighbours, which are one thread's.
            eight = tl.program_id(0) * (WIDE // 8) + tl.arange(0, WIDE // 8)
            octets = bits.to(tl.pointer_type(tl.int8), bitcast=True) + eight[None, :]
            some = (row < rows)[:, None]
            octet = tl.load(octets + row[:, None] * (CHANNELS // 8), mask=some, other=0)
            moved = octet.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
            inside = tl.reshape(moved & 1, (LONG, WIDE)) != 0
        elif MASK:
            inside = ((tl.load(bits + word, mask=ok, other=0) >> lane) & 1) != 0
        else:
            value = tl.fma(centred, factor, offset).to(x.dtype.element_ty).to(tl.float32)
            if ADD:
                value = _sum_with(value, other, at, ok, x.dtype.element_ty)
            inside = _inside(value, limit, RECTIFY)
            if LEARNED:
                sum_range += _slope(raw.to(tl.float32), value, inside, limit, QMIN, QMAX)
        passed = tl.where(inside, raw, 0.0)
        if ADD:
            tl.store(grad_other + at, passed, mask=ok)
        passed = passed.to(tl.float32)
        sum_shift += passed
        sum_gain += passed * centred
        passed = passed * (factor * inverse)
        tl.store(grad_x + at, passed.to(grad_x.dtype.element_ty), mask=ok)
    place = sums + part * CHANNELS + channel
    tl.store(place, tl.sum(sum_gain, axis=0), mask=known)
    size = tl.num_programs(1) * CHANNELS
    tl.store(place + size, tl.sum(sum_shift, axis=0), mask=known)
    if LEARNED:
        tl.store(place + 2 * size, tl.sum(sum_range, axis=0), mask=known)


@triton.jit
def row_ranges(weights, lengths, amax, BLOCK: tl.constexpr):
    """Computes the largest absolute value of each row, given the addresses of the rows."""
    row = tl.program_id(0)
    weight = tl.load(weights + row).to(tl.pointer_type(tl.float32))
    length = tl.load(lengths + row)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.abs(tl.load(weight + at, mask=at < length, other=0.0))
        largest = tl.maximum(largest, value, propagate_nan=tl.PropagateNan.ALL)
    # A NaN, which tl.max would pass over, stays one.
    strange = tl.max((largest != largest).to(tl.int32), axis=0)
    tl.store(amax + row, tl.where(strange != 0, float('nan'), tl.max(largest, axis=0)))


@triton.jit
def row_rounding(
    weights, lengths, ranges, starts, rounded,
    QMIN: tl.constexpr, QMAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rounds rows, given their addresses and those of their ranges, into one tensor."""
    row = tl.program_id(0)
    weight = tl.load(weights + row).to(tl.pointer_type(tl.float32))
    limit = tl.load(tl.load(ranges + row).to(tl.pointer_type(tl.float32)))
    out = rounded + tl.load(starts + row)
    length = tl.load(lengths + row)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(weight + at, mask=at < length, other=0.0)
        value = _rounded(value, limit, QMIN, QMAX)
        tl.store(out + at, value.to(rounded.dtype.element_ty), mask=at < length)


@triton.jit
def count(x, exponent, tables, n, TABLES: tl.constexpr, BLOCK: tl.constexpr):
    """Counts absolute values below ``2**exponent``; see calibration/counting.py for the bins."""
    pid = tl.program_id(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < n
    value = tl.abs(tl.load(x + at, mask=ok, other=0.0))
    lowest = tl.load(exponent) - 16
    # 2**lowest, and widths of the lowest bins in it, by the bits of a float32
    low = ((lowest + 127) << 23).to(tl.float32, bitcast=True)
    scale = ((138 - lowest) << 23).to(tl.float32, bitcast=True)
    index = (value.to(tl.int32, bitcast=True) >> 12) - (((lowest + 127) << 11) - 2048)
    below = (tl.minimum(value, low) * scale).to(tl.int32)
    place = tl.minimum(tl.maximum(index, below), 34815)  # infinity and NaN are noticed elsewhere
    table = tables + (pid % TABLES) * 34816
    tl.atomic_add(table + place, 1, mask=ok & (place > 0), sem='relaxed')
    tl.atomic_add(table, tl.sum((ok & (place == 0)).to(tl.int32), axis=0), sem='relaxed')
