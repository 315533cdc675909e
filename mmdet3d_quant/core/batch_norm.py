"""Batch norm of given statistics, sum, ReLU and rounding on a GPU, in one pass each way.

Kept for the backward pass: what a batch norm keeps anyway, its input. From it the tensor that was
rounded is computed again, so that a learned range needs nothing more; with a sum and a fixed range
a bit for each element is kept instead of the other summand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from mmdet3d_quant.core import fused
from mmdet3d_quant.core.formats import Format
from mmdet3d_quant.core.spec import QuantSpec

if fused.AVAILABLE:
    from mmdet3d_quant.core import kernels
    from mmdet3d_quant.core.launch import launch

#: Elements of a plane that a program of the forward takes.
_PLANE = 1024
#: Channels and rows that a program of the backward takes at a time.
_WIDE, _LONG = 64, 16
#: Programs of the backward at most, several for each place that a GPU has for one; and how many
#: times a program takes rows at least.
_PROGRAMS, _TIMES = 4096, 4


class Frozen(NamedTuple):
    """A batch norm of given statistics.

    Attributes:
        gain: (C,), its weight.
        shift: (C,), its bias.
        mean: (C,), the running mean.
        var: (C,), the running variance.
        eps: What is added to the variance.
    """

    gain: Tensor
    shift: Tensor
    mean: Tensor
    var: Tensor
    eps: float


class Ends(NamedTuple):
    """Between which steps a tensor is rounded.

    Attributes:
        qmin: Least step, 0 of a ReLU.
        qmax: Greatest step.
        rectify: Whether it is rounded behind a ReLU.
    """

    qmin: int
    qmax: int
    rectify: bool


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
    return fused.serves(x, amax, spec) and knows(x, norm, other)


def knows(x: Tensor, norm: nn.Module, other: Tensor | None = None) -> bool:
    """Tells whether the kernels compute a norm, whatever rounds its result.

    Args:
        x: Input of the norm, dense.
        norm: The norm.
        other: What is added to its result.
    """
    if type(norm) is not nn.BatchNorm2d or norm.training or norm.running_var is None:
        return False
    if x.dim() != 4 or norm.weight is None:
        return False
    if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
        return False
    if any(t.dtype != torch.float32 for t in (norm.weight, norm.bias, norm.running_var)):
        return False
    planes = fused.channels_last(x) is None
    # Sums by plane would cost more than tiny planes themselves.
    return not planes or (x.shape[0] < 2**16 and x.shape[2] * x.shape[3] >= 64)


def of(norm: Any) -> Frozen:
    """Takes a norm's parameters and statistics."""
    return Frozen(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


def ends(fmt: Format, rectify: bool) -> Ends:
    """Gives the ends of a format, or of its ReLU."""
    return Ends(0 if rectify else fmt.qmin, fmt.qmax, rectify)


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
    if other is not None:
        other = fused.like(other, x)
    return _Normed.apply(x, other, amax, *of(norm), ends(spec.format, rectify))


class _Normed(Function):
    """The pass, with gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        other: Tensor | None,
        amax: Tensor,
        gain: Tensor,
        shift: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        steps: Ends,
    ) -> Tensor:
        learned = ctx.needs_input_grad[2]
        norm = Frozen(gain, shift, mean, var, eps)
        y, bits = forward(x, other, amax, norm, steps, other is not None and not learned)
        ctx.eps, ctx.steps, ctx.learned = eps, steps, learned
        ctx.save_for_backward(x, other if learned else None, bits, amax, *norm[:4])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, other, bits, amax, gain, shift, mean, var = ctx.saved_tensors
        norm = Frozen(gain, shift, mean, var, ctx.eps)
        *found, by_channel = backward(grad, x, other, bits, amax, norm, ctx.steps, ctx.learned)
        return (*found, *by_channel, *[None] * 4)


def forward(
    x: Tensor, other: Tensor | None, amax: Tensor, norm: Frozen, steps: Ends, mask: bool
) -> tuple[Tensor, Tensor | None]:
    """Computes the pass.

    Args:
        x: (N, C, H, W), dense.
        other: What is added, of the order of ``x`` in memory, if anything is.
        amax: Range limit, float32 of one element.
        norm: The norm.
        steps: Where the rounding ends.
        mask: Store the mask of the gradient.

    Returns:
        Tensor like ``x``, and the mask: 32 elements a word, in the order of ``x`` in memory.
    """
    batch, channels, height, width = x.shape
    inner = height * width
    planes = fused.channels_last(x) is None
    block = _PLANE if planes else fused.BLOCK
    grid = (batch * channels, -(-inner // block)) if planes else (-(-x.numel() // block), 1)
    bits = None
    if mask:
        words = grid[0] * grid[1] * (block // 32)
        bits = torch.empty(words, dtype=torch.int32, device=x.device)
    y = torch.empty_like(x)
    if x.numel():
        launch(
            kernels.normed_forward, grid, x, x if other is None else other, y,
            x if bits is None else bits, amax, norm.mean, norm.var, norm.gain, norm.shift,
            norm.eps, x.numel(), inner, channels, planes, other is not None, *steps, mask, block,
        )  # fmt: skip
    return y, bits


def backward(
    grad: Tensor,
    x: Tensor,
    other: Tensor | None,
    bits: Tensor | None,
    amax: Tensor,
    norm: Frozen,
    steps: Ends,
    learned: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Computes the gradients of :func:`forward`.

    Args:
        grad: Gradient of the result.
        x: As there.
        other: As there; may be left out if there is a mask.
        bits: The mask, if it was stored.
        amax: As there.
        norm: As there.
        steps: As there.
        learned: Whether the range has a gradient, which takes ``other`` instead of the mask.

    Returns:
        Gradients of ``x``, of what was added and of the range, and (2, C): those of gain and shift.
    """
    grad = fused.like(grad, x)
    add = other is not None or bits is not None
    batch, channels, height, width = x.shape
    inner = height * width
    grad_x = torch.empty_like(x)
    grad_other = torch.empty_like(x) if add else None
    if not x.numel():
        grad_amax = torch.zeros_like(amax) if learned else None
        return grad_x, grad_other, grad_amax, x.new_zeros((2, channels), dtype=torch.float32)
    planes = fused.channels_last(x) is None
    if planes:
        rows, parts, each, wide, long = batch, batch, inner, 1, 1024
    else:
        rows, wide, long = batch * inner, _WIDE, _LONG
        groups = -(-channels // wide)
        parts = max(1, min(-(-rows // (_TIMES * long)), _PROGRAMS // groups))
        each = -(-rows // parts // long) * long
        parts = -(-rows // each)
    sums = torch.empty((2 + learned, parts, channels), device=x.device)
    launch(
        kernels.normed_backward, (-(-channels // wide), parts), grad, x,
        x if other is None else other, x if bits is None else bits, grad_x,
        grad_x if grad_other is None else grad_other, sums, amax, norm.mean, norm.var, norm.gain,
        norm.shift, norm.eps, rows, inner, each, -(-inner // _PLANE) * (_PLANE // 32), channels,
        planes, add, *steps, bits is not None, learned, wide, long,
    )  # fmt: skip
    grad_amax = fused.range_gradient(sums[2], amax, x, steps.qmax) if learned else None
    return grad_x, grad_other, grad_amax, sums[:2].sum(1)
