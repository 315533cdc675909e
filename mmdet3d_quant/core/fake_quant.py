"""Fake quantization: rounding a float tensor to a grid, and its gradients."""

from __future__ import annotations

from functools import lru_cache
from itertools import repeat
from typing import Any

import torch
import torch._dynamo  # torch 2.0 does not by itself
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import Function
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mmdet3d_quant.core import fused, opaque
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.formats import MIN_AMAX, Format
from mmdet3d_quant.core.spec import QuantSpec

#: How many dispatch modes are entered, which is asked often.
_modes = torch._C._len_torch_dispatch_stack
#: Values of a piece. On a CPU a large tensor is computed piece by piece: they stay in the cache.
_CHUNK = 2**19
#: Integer type of the same width as a float, by bytes: adding 1 to the bits gives the next float.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def compiling() -> bool:
    """Tells whether torch.compile traces this code or runs it on fake tensors."""
    if torch._dynamo.is_compiling():
        return True
    if not _modes():
        return False
    return any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())


def largest(x: Tensor, dims: list[int]) -> Tensor:
    """Computes ``x.abs().amax(dims, keepdim=True)`` without a tensor of the size of ``x``."""
    return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))


def fake_quantize(
    x: Tensor,
    amax: Tensor,
    spec: QuantSpec,
    rectify: bool = False,
    value: float | None = None,
    inside: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Quantizes and dequantizes ``x``: ``clamp(round(x / scale), qmin, qmax) * scale``.

    Halves round to even. A GPU is not synchronized with.

    The gradient of ``x`` is that of pytorch-quantization: it passes where ``|x| <= amax`` and is 0
    elsewhere.

    The gradient of ``amax``, if it needs one, is that of LSQ (Esser et al., 2020), taken with
    respect to the range instead of the step: the sum of ``g * (y - x) / amax`` where
    ``|x| <= amax`` and of ``g * y / amax`` elsewhere, times ``1 / sqrt(n * qmax)``. Here n is the
    number of features, as the paper calls them: per tensor, the values of one sample (an index of
    the first dimension), so that the gradient is a sum over samples; with an axis, the values of
    one range.

    Args:
        x: Tensor of any floating type. Computed in float32; a float64 one in float64, for tests of
            identities that hold up to rounding only.
        amax: float32 with one element (per tensor), or one element per index of ``spec.axis``.
        spec: Bits and axis.
        rectify: Quantize ``relu(x)`` instead, without passes over memory for the ReLU.
        value: ``amax`` as a Python number, if the caller knows it; on a GPU that saves passes over
            memory.
        inside: Promises ``|x| <= amax`` everywhere: the gradient of ``x`` is not masked. Ignored
            if ``amax`` needs a gradient.
        inplace: Allows the result to take the place of ``x``, which saves memory on a GPU.

    Returns:
        Tensor of the shape and dtype of ``x``.
    """
    if not x.dim():
        return fake_quantize(x.reshape(1), amax, spec, rectify, value, inside).reshape(())
    if (x.is_cuda or fused.INTERPRETED) and not compiling() and fused.serves(x, amax, spec):
        return fused.fake_quantize(x, amax, spec, rectify, inside, inplace)
    if spec.axis is not None:
        amax = amax.reshape([-1 if i == spec.axis else 1 for i in range(x.dim())])
    else:
        amax = amax.reshape(1)  # not 0-dimensional: it decides the dtype of comparisons with x
    if torch.is_grad_enabled() and (x.requires_grad or amax.requires_grad):
        if compiling():  # torch 2.1 does not trace into a Function
            return _traceable(x.relu() if rectify else x, amax, spec)
        return _FakeQuantize.apply(x, amax, spec, rectify, value, inside)
    return _rounded(x, amax, spec, rectify, value)


def _rounded(
    x: Tensor, amax: Tensor, spec: QuantSpec, rectify: bool = False, value: float | None = None
) -> Tensor:
    """Computes the values of :func:`fake_quantize`, with the operator that is fast for a device."""
    exact = x if x.dtype == torch.float64 else x.float()
    fmt = spec.format
    by_steps = x.device.type == 'cpu' or exact.dtype == torch.float64 or not fmt.fused
    if by_steps or spec.axis is not None:
        # torch's operator for a range per channel would wait for a GPU.
        scale = fmt.step(amax.to(exact.dtype))
        return _rounded_by_steps(exact, scale, fmt, rectify).to(x.dtype)
    ends = 0 if rectify else fmt.qmin, fmt.qmax
    if value is not None:
        exact = x if x.dtype == torch.float16 else exact  # rounds it in float32, too
        y = torch.fake_quantize_per_tensor_affine(exact, _step(value, spec), 0, *ends)
        return y.to(x.dtype)
    scale = fmt.step(amax)
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_tensor_affine(exact, scale, zero_point, *ends).to(x.dtype)


def _rounded_by_steps(x: Tensor, scale: Tensor, fmt: Format, rectify: bool) -> Tensor:
    """Rounds ``x / scale`` and multiplies by ``scale``, keeping float64.

    On a CPU these steps are vectorised, while torch's fused operator visits values one by one.
    """
    inverse = 1 / scale
    if not _in_pieces(x, scale):
        return fmt.round_(x * inverse, rectify).mul_(scale)
    y = torch.empty_like(x)
    if scale.numel() == 1:
        parts = x.view(-1).split(_CHUNK), y.view(-1).split(_CHUNK), repeat(inverse), repeat(scale)
    else:
        rows = max(1, _CHUNK // x[0].numel())
        parts = tuple(t.split(rows) for t in (x, y, inverse, scale))
    for part, out, factor, step in zip(*parts):  # repeat() has no end
        torch.mul(part, factor, out=out)
        fmt.round_(out, rectify).mul_(step)
    return y


def _in_pieces(x: Tensor, amax: Tensor) -> bool:
    """Tells whether to compute piece by piece: on a CPU, of a large contiguous tensor."""
    large = x.device.type == 'cpu' and x.numel() > _CHUNK
    by_rows = amax.numel() in (1, amax.shape[0])
    return large and by_rows and x.is_contiguous() and not compiling()


class _FakeQuantize(Function):
    """Fake quantization with gradients.

    Saved for backward: the input; also the output if the range is learned. Usually this costs no
    memory, since the ReLU before saved the input and the next convolution saves the output. With
    ``rectify`` the input is the ReLU's, which no other module saves.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        amax: Tensor,
        spec: QuantSpec,
        rectify: bool,
        value: float | None,
        inside: bool,
    ) -> Tensor:
        y = _rounded(x, amax, spec, rectify, value)
        ctx.qmax, ctx.rectify, ctx.value = spec.format.qmax, rectify, value
        learned = ctx.needs_input_grad[1]
        ctx.passes = inside and not learned
        if not ctx.passes:
            ctx.save_for_backward(x, amax, y if learned else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.passes:
            return grad, None, None, None, None, None
        x, amax, y = ctx.saved_tensors
        if y is None:
            return masked(grad, x, amax, ctx.rectify, ctx.value), None, None, None, None, None
        grad_x, slope = _slope(grad, x, y, amax, ctx.rectify)
        grad_amax = slope.reshape(amax.shape) * _lsq_factor(x, amax, ctx.qmax)
        return grad_x if ctx.needs_input_grad[0] else None, grad_amax, None, None, None, None


def _slope(
    grad: Tensor, x: Tensor, y: Tensor, amax: Tensor, rectify: bool
) -> tuple[Tensor, Tensor]:
    """Computes the gradient of ``x``, and of ``amax`` before it is scaled.

    Returns:
        ``grad_x``, which is ``grad`` inside the range and 0 elsewhere, and
        ``sum(grad * y - grad_x * x)`` for each range.
    """
    contiguous = all(t.is_contiguous() for t in (grad, x, y))
    if amax.numel() > 1 or x.element_size() < 4 or not contiguous:
        grad_x = masked(grad, x, amax, rectify)
        others = [i for i in range(x.dim()) if i >= amax.dim() or amax.shape[i] == 1]
        return grad_x, (y * grad - grad_x * x).float().sum(others)
    if not _in_pieces(x, amax):
        grad_x = masked(grad, x, amax, rectify)
        return grad_x, (_dot(grad, y) - _dot(grad_x, x)).to(amax.dtype)
    grad_x = torch.empty_like(grad)
    slope = amax.new_zeros(1)
    pieces = (t.view(-1).split(_CHUNK) for t in (grad, x, y, grad_x))
    for g, value, rounded, out in strict_zip(*pieces):
        out.copy_(masked(g, value, amax, rectify))
        slope += _dot(g, rounded) - _dot(out, value)
    return grad_x, slope


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Computes ``(a * b).sum()`` of contiguous tensors without a tensor of their size."""
    return torch.dot(a.view(-1), b.view(-1))


def _lsq_factor(x: Tensor, amax: Tensor, qmax: int) -> Tensor:
    """Computes ``1 / (amax * sqrt(n * qmax))``, where n counts features."""
    # At least 1: a sparse tensor may have no sites left, and its range a gradient of zero then.
    features = max(1, x.numel() / max(1, x.shape[0] if amax.numel() == 1 else amax.numel()))
    return 1 / (amax.clamp(min=MIN_AMAX) * (features * qmax) ** 0.5)


def _stepwise(x: Tensor, amax: Tensor, spec: QuantSpec) -> Tensor:
    """Rounds by steps that a compiler fuses."""
    scale = spec.format.step(amax.to(x.dtype))
    return spec.format.round_(x * (1 / scale)).mul(scale)


def _traceable(x: Tensor, amax: Tensor, spec: QuantSpec) -> Tensor:
    """Computes :func:`fake_quantize` from operations that autograd and torch.compile know.

    The result is the value without gradient, plus terms that are zero and have the gradients. In
    the backward pass those are computed from ``x`` and the result: a compiler that has them needs
    to keep nothing more.
    """
    exact = x if x.dtype == torch.float64 else x.float()
    limit = amax.detach().to(exact.dtype)
    y = _stepwise(exact.detach(), limit, spec)
    fmt = spec.format
    if not amax.requires_grad or opaque.serves(x, amax, fmt):
        clipped = _clipped(exact, limit)
        rounded = (y + (clipped - clipped.detach())).to(x.dtype)
        if not amax.requires_grad:
            return rounded
        return opaque.WithRange.apply(rounded, x.detach(), amax, fmt.qmin, fmt.qmax)
    share = (amax - limit) * _lsq_factor(x, limit, fmt.qmax)
    clipped = _clipped(exact * (1 - share), limit)
    return (y + (clipped - clipped.detach()) + y * share).to(x.dtype)


def _clipped(x: Tensor, limit: Tensor) -> Tensor:
    """Clips ``x`` for its gradient, which passes where ``|x| <= limit``, edge included."""
    if _EDGE_HALVED:
        limit = torch.nextafter(limit, torch.full_like(limit, float('inf')))
    return x.clamp(-limit, limit)


@torch.inference_mode(False)
@torch.enable_grad()
def _halves_edges() -> bool:
    """Tells whether this torch halves the gradient of a clamp at its limits (2.14 does)."""
    one = torch.ones(1)
    clipped: Any = torch.ones(1, requires_grad=True).clamp(-one, one)
    # Asked without a backward pass, which starts threads: processes could not be forked any more.
    return bool(clipped.grad_fn(one)[0] < 1)


_EDGE_HALVED = _halves_edges()


def masked(
    grad: Tensor, x: Tensor, amax: Tensor, rectify: bool, value: float | None = None
) -> Tensor:
    """Masks ``grad``: kept where ``|x| <= amax``, with ``rectify`` where ``0 < x <= amax``."""
    on_cpu = x.device.type == 'cpu'
    if on_cpu and amax.numel() == 1:
        value = amax.item()
    if value is not None and not (on_cpu and x.dtype == torch.float16):
        end = _beyond(value, x.dtype)
        # One pass over memory; its bounds are exclusive.
        return torch.ops.aten.hardtanh_backward(grad, x, 0.0 if rectify else -end, end)
    if rectify:
        return torch.where((x > 0) & (x <= amax), grad, 0)
    if on_cpu and amax.numel() > 1:
        others = [i for i in range(x.dim()) if amax.shape[i] == 1]
        if (largest(x, others) <= amax).all():
            return grad  # as it mostly is with weights, whose ranges follow them
    return torch.where(x.abs() <= amax, grad, 0)


@lru_cache(maxsize=4096)
def _step(amax: float, spec: QuantSpec) -> float:
    """Computes the step size for a number, in float32."""
    return spec.format.step(torch.tensor(amax, dtype=torch.float32)).item()


@lru_cache(maxsize=4096)
def _beyond(value: float, dtype: torch.dtype) -> float:
    """Finds the smallest number of ``dtype`` above ``value``, which is a float32 >= 0."""
    near = torch.tensor(value, dtype=dtype)
    if near.item() <= value:
        near = (near.view(_BITS[near.element_size()]) + 1).view(dtype)
    return near.item()
