"""Batch norm of given statistics, sum, ReLU and rounding on a GPU, in one pass each way.

Kept for the backward pass: what a batch norm keeps anyway, its input. From it the tensor that was
rounded is computed again, so that a learned range needs nothing more; with a sum and a fixed range
a bit for each element is kept instead of the other summand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from mmdet3d_quant.core import fused
from mmdet3d_quant.core.spec import QuantSpec

if fused.AVAILABLE:
    from mmdet3d_quant.core import kernels
    from mmdet3d_quant.core.launch import launch

#: Elements of a plane that a program of the forward takes.
_PLANE = 1024
#: Channels and rows that a program of the backward takes at a time.
_WIDE, _LONG = 64, 32
#: Programs of the backward that share the rows of a group of channels, at most.
_PARTS = 512


def serves(
    x: Tensor, norm: nn.Module, amax: Tensor, spec: QuantSpec, other: Tensor | None = None
) -> bool:
    """Tells whether a norm and the rounding behind it are computed in one pass.

    Args:
        x: Input of the norm.
        norm: The norm: joined if it is torch's own, with weights, and uses running statistics.
        amax: Range limit of the rounding.
        spec: Its bits and axis.
        other: What is added in between.
    """
    if type(norm) is not nn.BatchNorm2d or norm.training or norm.running_var is None:
        return False
    if not fused.serves(x, amax, spec) or x.dim() != 4 or norm.weight is None:
        return False
    if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
        return False
    if any(t.dtype != torch.float32 for t in (norm.weight, norm.bias, norm.running_var)):
        return False
    planes = fused.channels_last(x) is None
    # Sums by plane would cost more than tiny planes themselves.
    return not planes or (x.shape[0] < 2**16 and x.shape[2] * x.shape[3] >= 64)


def rounded(
    x: Tensor, norm: Any, amax: Tensor, spec: QuantSpec, rectify: bool, other: Tensor | None = None
) -> Tensor:
    """Rounds ``norm(x) + other``, or the ReLU of that.

    Args:
        x: (N, C, H, W), for which :func:`serves` holds.
        norm: The batch norm.
        amax: Range limit.
        spec: Bits.
        rectify: Round the ReLU.
        other: Tensor like ``x``.

    Returns:
        Tensor like ``x``.
    """
    args = (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    if other is not None:
        other = fused.like(other, x)
    return _Normed.apply(x, other, amax, *args, spec.format, rectify)


class _Normed(Function):
    """The pass, with gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, other: Tensor | None, amax: Tensor, gain: Tensor, shift: Tensor,
        mean: Tensor, var: Tensor, eps: float, fmt: Any, rectify: bool,
    ) -> Tensor:  # fmt: skip
        batch, channels, height, width = x.shape
        inner = height * width
        planes = fused.channels_last(x) is None
        learned = ctx.needs_input_grad[2]
        ctx.fmt, ctx.rectify, ctx.eps, ctx.planes, ctx.learned = fmt, rectify, eps, planes, learned
        block = _PLANE if planes else fused.BLOCK
        grid = (batch * channels, -(-inner // block)) if planes else (-(-x.numel() // block), 1)
        bits = None
        if other is not None and not learned:
            words = grid[0] * grid[1] * (block // 32)
            bits = torch.empty(words, dtype=torch.int32, device=x.device)
        ctx.save_for_backward(x, other if learned else None, bits, amax, gain, shift, mean, var)
        y = torch.empty_like(x)
        if x.numel():
            launch(
                kernels.normed_forward, grid, x, x if other is None else other, y,
                x if bits is None else bits, amax, mean, var, gain, shift, eps,
                x.numel(), inner, channels, planes, other is not None,
                0 if rectify else fmt.qmin, fmt.qmax, rectify, bits is not None, block,
            )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, other, bits, amax, gain, shift, mean, var = ctx.saved_tensors
        grad = fused.like(grad, x)
        add = other is not None or bits is not None
        batch, channels, height, width = x.shape
        inner = height * width
        grad_x = torch.empty_like(x)
        grad_other = torch.empty_like(x) if add else None
        if not x.numel():
            return (
                grad_x,
                grad_other,
                torch.zeros_like(amax),
                torch.zeros_like(gain),
                None,
                *[None] * 5,
            )
        if ctx.planes:
            rows, parts, each, wide, long = batch, batch, inner, 1, 1024
        else:
            rows, wide, long = batch * inner, _WIDE, _LONG
            groups = -(-channels // wide)
            parts = max(1, min(-(-rows // long), _PARTS // groups or 1))
            each = -(-rows // parts // long) * long
            parts = -(-rows // each)
        sums = torch.empty((2 + ctx.learned, parts, channels), device=x.device)
        launch(
            kernels.normed_backward, (-(-channels // wide), parts), grad, x,
            x if other is None else other, x if bits is None else bits, grad_x,
            grad_x if grad_other is None else grad_other, sums, amax, mean, var, gain, shift,
            ctx.eps, rows, inner, each, -(-inner // _PLANE) * (_PLANE // 32), channels, ctx.planes,
            add, 0 if ctx.rectify else ctx.fmt.qmin, ctx.fmt.qmax, ctx.rectify, bits is not None,
            ctx.learned, wide, long,
        )  # fmt: skip
        by_channel = sums[:2].sum(1)
        grad_amax = None
        if ctx.learned:
            grad_amax = fused.range_gradient(sums[2], amax, x, ctx.fmt.qmax)
        return grad_x, grad_other, grad_amax, by_channel[1], by_channel[0], *[None] * 5
