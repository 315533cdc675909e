"""Fake quantization: rounding a float tensor to an integer grid, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mmdet3d_quant.spec import MIN_AMAX, QuantSpec

#: On a CPU so many values take all steps before the next ones do: they stay in its cache.
_CHUNK = 2**19
_compiling = torch._dynamo.is_compiling


def scale_of(amax: Tensor, spec: QuantSpec) -> Tensor:
    """Step size of the grid, ``amax / qmax``, kept away from zero by :data:`MIN_AMAX`.

    Args:
        amax: Range limit(s), float32, any shape, >= 0.
        spec: The grid.

    Returns:
        Tensor of the shape of ``amax``, float32, > 0.
    """
    return amax.clamp(min=MIN_AMAX) / spec.qmax


def largest(x: Tensor, dims: list[int]) -> Tensor:
    """Largest absolute value over some dimensions, which are kept with size 1.

    Unlike ``x.abs().amax(dims)`` it writes no tensor of the size of ``x``.
    """
    return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))


def fake_quantize(x: Tensor, amax: Tensor, spec: QuantSpec) -> Tensor:
    """Rounds ``x`` to the grid and back, ``clamp(round(x / scale), qmin, qmax) * scale``.

    Rounds half to even: torch's fused operator on a GPU, which is not waited for, and the same by
    vectorised steps on a CPU.

    Backward, as in pytorch-quantization, the gradient passes where ``|x| <= amax`` and is 0
    elsewhere. Where ``amax`` needs a gradient it gets that of LSQ (Esser et al., 2020) in terms of
    the range instead of the step: ``sum(g * (y - x)) / amax`` inside and ``sum(g * y) / amax``
    outside, times ``1 / sqrt(n * qmax)``, where n is what the paper calls features: the values per
    index of the first dimension (per sample, so that the gradient is a sum over samples), or with
    an axis the values per range.

    Args:
        x: Tensor of any floating type; computed in float32, or in float64 if it is float64
            (to check identities that float32 rounding blurs; not fused).
        amax: float32 with one element (per tensor), or one element per index of ``spec.axis``.
        spec: The grid.

    Returns:
        Tensor of the shape and dtype of ``x``.
    """
    if spec.axis is not None:
        amax = amax.reshape([-1 if i == spec.axis else 1 for i in range(x.dim())])
    else:
        amax = amax.reshape(1)  # not 0-dimensional: it decides the dtype of comparisons with x
    if torch.is_grad_enabled() and (x.requires_grad or amax.requires_grad):
        if _compiling():  # torch 2.1 does not trace into a Function
            return _traceable(x, amax, spec)
        return _FakeQuantize.apply(x, amax, spec)
    return _rounded(x, amax, spec)


def _rounded(x: Tensor, amax: Tensor, spec: QuantSpec) -> Tensor:
    exact = x if x.dtype == torch.float64 else x.float()
    scale = scale_of(amax.to(exact.dtype), spec)
    if exact.dtype == torch.float64 or x.device.type == 'cpu':
        return _rounded_by_steps(exact, scale, spec).to(x.dtype)
    flat = scale.flatten()
    zero_point = torch.zeros_like(flat, dtype=torch.int32)
    if spec.axis is None:
        y = torch.fake_quantize_per_tensor_affine(exact, flat, zero_point, spec.qmin, spec.qmax)
    else:
        y = torch.fake_quantize_per_channel_affine(
            exact, flat, zero_point, spec.axis, spec.qmin, spec.qmax
        )
    return y.to(x.dtype)


def _rounded_by_steps(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Vectorised: torch's fused operator visits values one by one on a CPU. float64 stays so."""
    inverse = 1 / scale
    if not _in_pieces(x, scale):
        return (x * inverse).round_().clamp_(spec.qmin, spec.qmax).mul_(scale)
    y = torch.empty_like(x)
    for part, out in zip(x.view(-1).split(_CHUNK), y.view(-1).split(_CHUNK), strict=True):
        torch.mul(part, inverse, out=out)
        out.round_().clamp_(spec.qmin, spec.qmax).mul_(scale)
    return y


def _in_pieces(x: Tensor, amax: Tensor) -> bool:
    """Whether a tensor is worth visiting piece by piece."""
    large = x.device.type == 'cpu' and x.numel() > _CHUNK
    return large and amax.numel() == 1 and x.is_contiguous() and not _compiling()


class _FakeQuantize(Function):
    """Saves its input and, for a learned range, its output: tensors that the layers before (a
    ReLU) and after (a convolution) keep for their own gradients anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, spec: QuantSpec) -> Tensor:
        y = _rounded(x, amax, spec)
        ctx.qmax = spec.qmax
        ctx.save_for_backward(x, amax, y if ctx.needs_input_grad[1] else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, amax, y = ctx.saved_tensors
        if y is None:
            return _inside(grad, x, amax), None, None
        grad_x, slope = _slope(grad, x, y, amax)
        grad_amax = slope.reshape(amax.shape) * _lsq_factor(x, amax, ctx.qmax)
        return grad_x if ctx.needs_input_grad[0] else None, grad_amax, None


def _slope(grad: Tensor, x: Tensor, y: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """``grad`` where ``|x| <= amax``, else 0; and ``sum(grad * y - that * x)`` for each range."""
    if _in_pieces(grad, amax) and x.is_contiguous() and y.is_contiguous():
        grad_x = torch.empty_like(grad)
        slope = amax.new_zeros(1)
        pieces = (t.view(-1).split(_CHUNK) for t in (grad, x, y, grad_x))
        for g, value, rounded, out in zip(*pieces, strict=True):
            out.copy_(_inside(g, value, amax))
            slope += (rounded * g).addcmul_(out, value, value=-1).sum(dtype=slope.dtype)
        return grad_x, slope
    grad_x = _inside(grad, x, amax)
    others = [i for i in range(x.dim()) if i >= amax.dim() or amax.shape[i] == 1]
    return grad_x, (y * grad - grad_x * x).float().sum(others)


def _lsq_factor(x: Tensor, amax: Tensor, qmax: int) -> Tensor:
    # At least 1: a sparse tensor may have no sites left, and its range a gradient of zero then.
    features = max(1, x.numel() / max(1, x.shape[0] if amax.numel() == 1 else amax.numel()))
    return 1 / (amax.clamp(min=MIN_AMAX) * (features * qmax) ** 0.5)


def _traceable(x: Tensor, amax: Tensor, spec: QuantSpec) -> Tensor:
    """The same out of differentiable operations: the value, plus zeros with the gradients."""
    fixed = x.detach()
    inside = fixed.abs() <= amax.detach()
    y = _rounded(fixed, amax.detach(), spec)
    slope = torch.where(inside, y - fixed, y) * _lsq_factor(x, amax.detach(), spec.qmax)
    y = y + torch.where(inside, x - fixed, 0)
    return (y + slope * (amax - amax.detach())).to(x.dtype) if amax.requires_grad else y


def _inside(grad: Tensor, x: Tensor, amax: Tensor) -> Tensor:
    """``grad`` where ``|x| <= amax``, else 0."""
    fast = amax.numel() == 1 and x.device.type == 'cpu' and x.dtype == torch.float32
    if fast:
        # One pass over memory; its bounds are exclusive.
        limit = torch.nextafter(amax, amax.new_tensor(torch.inf)).item()
        return torch.ops.aten.hardtanh_backward(grad, x, -limit, limit)
    if x.device.type == 'cpu' and amax.numel() > 1:
        others = [i for i in range(x.dim()) if amax.shape[i] == 1]
        if (largest(x, others) <= amax).all():
            return grad  # of weights as a rule, whose ranges follow them
    return torch.where(x.abs() <= amax, grad, 0)
