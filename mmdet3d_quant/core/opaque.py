"""Kernels as operators that torch.compile calls, but does not look into.

A compiler fuses rounding and masks with what stands beside them, which is best where that is a
chain. It is not where a range is learned, whose sum it does not join with either, nor at the end of
a block: there it computes masks again from both summands, in several kernels, of which each reads
them. Here a kernel reads them once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from mmdet3d_quant.core import batch_norm, fused
from mmdet3d_quant.core.formats import Format

#: torch before 2.4 has no operators of this kind, and compiles none with learned ranges.
AVAILABLE = hasattr(torch.library, 'custom_op')


def serves(x: Tensor, amax: Tensor, fmt: Format) -> bool:
    """Tells whether compiled code can leave a rounding, or the gradient of its range, to kernels.

    Args:
        x: What is rounded.
        amax: Its range.
        fmt: The number format.
    """
    return AVAILABLE and fused.knows(x, amax, fmt)


def joins(x: Tensor, norm: nn.Module, amax: Tensor, fmt: Format, other: Tensor | None) -> bool:
    """Tells whether compiled code leaves a norm and the rounding behind it to :func:`normed`.

    Args:
        x: Input of the norm.
        norm: The norm.
        amax: Range limit.
        fmt: The number format.
        other: What is added in between, if anything is.
    """
    return serves(x, amax, fmt) and fused.is_dense(x) and batch_norm.knows(x, norm, other)


class WithRange(Function):
    """Passes a tensor and its gradient through; what was rounded gives the range its gradient."""

    @staticmethod
    def forward(ctx: Any, rounded: Tensor, x: Tensor, amax: Tensor, qmin: int, qmax: int) -> Tensor:
        """Returns ``rounded``.

        Args:
            ctx: Of autograd.
            rounded: What came of ``x``, with its gradient.
            x: What was rounded.
            amax: Its learned range, float32 of one element.
            qmin: Least step.
            qmax: Greatest step.
        """
        ctx.save_for_backward(x, amax)
        ctx.ends = qmin, qmax
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, amax = ctx.saved_tensors
        return grad, None, _ops.range_gradient(grad, x, amax, *ctx.ends), None, None


def normed(
    x: Tensor, norm: nn.Module, amax: Tensor, fmt: Format, rectify: bool, other: Tensor | None
) -> Tensor:
    """Rounds ``norm(x) + other``, or the ReLU of that, in one pass each way.

    Args:
        x: (N, C, H, W), for which :func:`joins` holds.
        norm: The batch norm.
        amax: Range limit.
        fmt: The number format.
        rectify: Round the ReLU.
        other: Tensor like ``x``, or nothing.

    Returns:
        Tensor like ``x``.
    """
    learned = amax.requires_grad
    # A mask is in the order of memory, which a compiler may change unless channels are last.
    mask = other is not None and not learned and fused.channels_last(x) is not None
    ends = batch_norm.ends(fmt, rectify)
    return _ops.normed(x, other, amax, *batch_norm.of(norm), *ends, mask, learned)[0]


_ops: Any = torch.ops.mmdet3d_quant


def _range_gradient(grad: Any, x: Any, amax: Any, qmin: Any, qmax: Any) -> Any:
    return fused.slope(grad, _dense(x), amax, qmin, qmax)


def _normed(x: Any, other: Any, amax: Any, *args: Any) -> Any:
    norm, ends, (mask, _) = _parts(args)
    x = _dense(x, mask)
    other = None if other is None else fused.like(other, x)
    y, bits = batch_norm.forward(x, other, amax, norm, ends, mask)
    return y, x.new_empty(0, dtype=torch.int32) if bits is None else bits


def _normed_gradient(grad: Any, x: Any, other: Any, bits: Any, amax: Any, *args: Any) -> Any:
    norm, ends, (learned,) = _parts(args)
    x = _dense(x, bits is not None)
    other = None if other is None else fused.like(other, x)
    found = batch_norm.backward(grad, x, other, bits, amax, norm, ends, learned)
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _parts(args: Any) -> Any:
    return batch_norm.Frozen(*args[:5]), batch_norm.Ends(*args[5:8]), args[8:]


def _dense(x: Tensor, last: bool = False) -> Tensor:
    """Brings a tensor into an order in memory that kernels take, or into channels last."""
    if last:
        return x.contiguous(memory_format=torch.channels_last)
    return x if fused.is_dense(x) else x.contiguous()


def _shape_of_normed(x: Any, other: Any, amax: Any, *args: Any) -> Any:
    mask = args[8]
    words = -(-x.numel() // fused.BLOCK) * (fused.BLOCK // 32) if mask else 0
    return torch.empty_like(_dense(x, mask)), x.new_empty(words, dtype=torch.int32)


def _shape_of_gradient(grad: Any, x: Any, other: Any, bits: Any, amax: Any, *args: Any) -> Any:
    x = _dense(x, bits is not None)
    nothing = x.new_empty(0)
    return (
        torch.empty_like(x),
        nothing if other is None and bits is None else torch.empty_like(x),
        torch.empty_like(amax) if args[8] else nothing,
        x.new_empty((2, x.shape[1]), dtype=torch.float32),
    )


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, other, amax, *args = inputs
    mask, learned = args[8:]
    ctx.add, ctx.rest = other is not None, (*args[4:8], learned)
    kept = None if mask else other
    ctx.save_for_backward(x, kept, output[1] if mask else None, amax, *args[:4])


def _backward(ctx: Any, grad: Any, _: Any) -> Any:
    found = _ops.normed_gradient(grad, *ctx.saved_tensors, *ctx.rest)
    grad_x, grad_other, grad_amax, (gain, shift) = found
    learned = ctx.rest[-1]
    return (
        grad_x,
        grad_other if ctx.add else None,
        grad_amax if learned else None,
        gain,
        shift,
        *[None] * 8,
    )


def _define() -> Any:
    """Tells torch of the operators; returns what holds them."""
    registry: Any = torch.library
    library = registry.Library(_NAME, 'FRAGMENT')
    # They take any order in memory, so that a compiler need not bring back the traced one.
    tags = getattr(torch.Tag, 'flexible_layout', ())
    for name, (schema, function, shape) in _OPERATORS.items():
        library.define(name + schema, tags=tags)
        for device in ('CPU', 'CUDA'):
            library.impl(name, function, device)
        registry.register_fake(f'{_NAME}::{name}', shape, lib=library)
    registry.register_autograd(f'{_NAME}::normed', _backward, setup_context=_keep, lib=library)
    return library


_NAME = 'mmdet3d_quant'
_NORM = 'Tensor amax, Tensor gain, Tensor shift, Tensor mean, Tensor var, float eps'
_ENDS = 'int qmin, int qmax, bool rectify'
#: By name: arguments, what computes it, what finds the shape of its result.
_OPERATORS: dict[str, Any] = {
    'range_gradient': (
        '(Tensor grad, Tensor x, Tensor amax, int qmin, int qmax) -> Tensor',
        _range_gradient,
        lambda grad, x, amax, qmin, qmax: torch.empty_like(amax),
    ),
    'normed': (
        f'(Tensor x, Tensor? other, {_NORM}, {_ENDS}, bool mask, bool learned) -> (Tensor, Tensor)',
        _normed,
        _shape_of_normed,
    ),
    'normed_gradient': (
        f'(Tensor grad, Tensor x, Tensor? other, Tensor? bits, {_NORM}, {_ENDS}, bool learned)'
        ' -> (Tensor, Tensor, Tensor, Tensor)',
        _normed_gradient,
        _shape_of_gradient,
    ),
}
if AVAILABLE:
    _library = _define()
