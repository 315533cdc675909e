"""Fake quantization on a GPU by Triton kernels: one pass over memory forward, one backward.

The values and gradients of :mod:`mmdet3d_quant.core.fake_quant`, whose functions choose between the
two. What is kept for the backward pass:

* fixed range: a bit for each element, nothing if all are known to be inside;
* learned range: the input, from which the output is computed again.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

from mmdet3d_quant.core.formats import Format
from mmdet3d_quant.core.spec import QuantSpec

INTERPRETED = AVAILABLE = False
if torch.cuda.device_count() or os.environ.get('TRITON_INTERPRET') == '1':
    # Elsewhere importing it would only take time.
    try:
        import triton

        INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
        #: Older ones lack operations that the kernels use.
        AVAILABLE = int(triton.__version__.split('.')[0]) >= 3
    except ImportError:
        pass
if AVAILABLE:
    from mmdet3d_quant.core import kernels
    from mmdet3d_quant.core.launch import launch

#: Elements of memory that one program takes; a multiple of 32.
BLOCK = 2048
_KINDS = (Tensor, Parameter)
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def serves(x: Tensor, amax: Tensor, spec: QuantSpec) -> bool:
    """Tells whether the kernels compute a tensor: dense, on a GPU, with one range.

    Args:
        x: The tensor.
        amax: Its range limit(s).
        spec: Bits and axis.
    """
    return (
        knows(x, amax, spec.format)
        and type(x) in _KINDS
        and amax.device == x.device
        and is_dense(x)
        and not torch.jit.is_tracing()
    )


def knows(x: Tensor, amax: Tensor, fmt: Format) -> bool:
    """Tells whether there are kernels for a type, a range and a format, whatever is in memory.

    Args:
        x: The tensor.
        amax: Its range limit(s).
        fmt: The number format.
    """
    return (
        (x.is_cuda or INTERPRETED)
        and AVAILABLE
        and x.dtype in _TYPES
        and amax.numel() == 1
        and amax.dtype == torch.float32
        and fmt.fused
    )


def is_dense(x: Tensor) -> bool:
    """Tells whether a tensor has no gaps, with channels first or last."""
    return x.is_contiguous() or channels_last(x) is not None


def channels_last(x: Tensor) -> torch.memory_format | None:
    """Finds the format of a tensor whose channels are last in memory, and only last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    found = formats.get(x.dim())
    if found is None or x.is_contiguous() or not x.is_contiguous(memory_format=found):
        return None
    return found


def like(grad: Tensor, x: Tensor) -> Tensor:
    """Gives a gradient the order in memory of the tensor whose it is."""
    if grad.stride() == x.stride() and grad.dtype == x.dtype:
        return grad
    return torch.empty_like(x).copy_(grad)


def fake_quantize(
    x: Tensor, amax: Tensor, spec: QuantSpec, rectify: bool, inside: bool, inplace: bool
) -> Tensor:
    """Computes :func:`mmdet3d_quant.core.fake_quant.fake_quantize` of what :func:`serves`.

    Args:
        x: The tensor.
        amax: Its range limit.
        spec: Bits; no axis.
        rectify: Quantize ``relu(x)``.
        inside: Promises that nothing is beyond the range.
        inplace: Allows the result to take the place of ``x``.
    """
    if torch.is_grad_enabled() and (x.requires_grad or amax.requires_grad):
        inplace = inplace and not amax.requires_grad and not (x.is_leaf or x._is_view())
        return _Rounding.apply(x, amax, spec.format, rectify, inside, inplace)
    return _forward(x, amax, spec.format, rectify, torch.empty_like(x), None)


def _forward(
    x: Tensor, amax: Tensor, fmt: Any, rectify: bool, y: Tensor, bits: Tensor | None
) -> Tensor:
    n = x.numel()
    if n:
        low = 0 if rectify else fmt.qmin
        launch(
            kernels.forward, (-(-n // BLOCK),), x, y, x if bits is None else bits, amax, n, low,
            fmt.qmax, rectify, bits is not None, BLOCK,
        )  # fmt: skip
    return y


class _Rounding(Function):
    """Rounding with gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, amax: Tensor, fmt: Any, rectify: bool, inside: bool, inplace: bool
    ) -> Tensor:
        learned = ctx.needs_input_grad[1]
        ctx.fmt, ctx.rectify, ctx.passes = fmt, rectify, inside and not learned
        bits = None
        if learned:
            ctx.save_for_backward(x, amax)
        elif not ctx.passes:
            blocks = -(-x.numel() // BLOCK)
            bits = torch.empty(blocks * (BLOCK // 32), dtype=torch.int32, device=x.device)
            # Gradients come in this order in memory or are brought into it.
            ctx.order = x.stride(), x.dtype, x.shape
            ctx.save_for_backward(bits)
        if inplace:
            ctx.mark_dirty(x)
        return _forward(x, amax, fmt, rectify, x if inplace else torch.empty_like(x), bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.passes:
            return grad, None, None, None, None, None
        kept = ctx.saved_tensors
        if len(kept) == 1:
            return _masked(grad, kept[0], *ctx.order), None, None, None, None, None
        x, amax = kept
        grad_x = torch.empty_like(x)
        low = 0 if ctx.rectify else ctx.fmt.qmin
        grad_amax = _learned(grad, x, amax, low, ctx.fmt.qmax, ctx.rectify, grad_x)
        return grad_x if ctx.needs_input_grad[0] else None, grad_amax, None, None, None, None


def _masked(
    grad: Tensor, bits: Tensor, stride: tuple, dtype: torch.dtype, shape: torch.Size
) -> Tensor:
    if grad.stride() != stride or grad.dtype != dtype:
        ordered = torch.empty_strided(shape, stride, dtype=dtype, device=grad.device)
        grad = ordered.copy_(grad)
    grad_x = torch.empty_like(grad)
    n = grad.numel()
    if n:
        launch(kernels.backward, (-(-n // BLOCK),), grad, bits, grad_x, n, BLOCK)
    return grad_x


def slope(grad: Tensor, x: Tensor, amax: Tensor, qmin: int, qmax: int) -> Tensor:
    """Computes the gradient of a learned range alone.

    Args:
        grad: Gradient of what ``x`` was rounded to, of its shape.
        x: Dense.
        amax: The range, float32 of one element.
        qmin: Least step.
        qmax: Greatest step.

    Returns:
        Tensor like ``amax``.
    """
    return _learned(grad, x, amax, qmin, qmax)


def _learned(
    grad: Tensor,
    x: Tensor,
    amax: Tensor,
    qmin: int,
    qmax: int,
    rectify: bool = False,
    grad_x: Tensor | None = None,
) -> Tensor:
    """Computes the gradient of a range; that of ``x`` goes into ``grad_x``, if there is one."""
    n = x.numel()
    if not n:
        return torch.zeros_like(amax)
    grad = like(grad, x)
    blocks = -(-n // BLOCK)
    sums = torch.empty(blocks, device=x.device)
    launch(
        kernels.backward_learned, (blocks,), grad, x, x if grad_x is None else grad_x, sums, amax,
        n, qmin, qmax, rectify, grad_x is not None, BLOCK,
    )  # fmt: skip
    return range_gradient(sums, amax, x, qmax)


def range_gradient(sums: Tensor, amax: Tensor, x: Tensor, qmax: int) -> Tensor:
    """Adds up partial sums, in their order, to the gradient of a range.

    Args:
        sums: float32, contiguous.
        amax: The range, of one element.
        x: The tensor that was rounded, of which only the shape counts.
        qmax: Greatest step of its format.

    Returns:
        Tensor like ``amax``.
    """
    grad_amax = torch.empty_like(amax)
    features = max(1, x.numel() / max(1, x.shape[0]))
    root = (features * qmax) ** 0.5
    launch(kernels.finish, (1,), sums, amax, grad_amax, sums.numel(), root, 1024)
    return grad_amax
