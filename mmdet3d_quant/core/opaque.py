"""The gradient of a learned range as an operator that torch.compile calls, but does not look into.

A compiler fuses the rounding and the masks, but not the sum over a tensor that a range needs with
either: it reads the tensors again, once for each level of the sum, in the order that suits it. Here
a kernel reads both once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mmdet3d_quant.core import fused
from mmdet3d_quant.core.formats import Format

#: torch before 2.4 has no operators of this kind, and compiles none with learned ranges.
AVAILABLE = hasattr(torch.library, 'custom_op')
_SCHEMA = '(Tensor grad, Tensor x, Tensor amax, int qmin, int qmax) -> Tensor'


def serves(x: Tensor, amax: Tensor, fmt: Format) -> bool:
    """Tells whether compiled code leaves the gradient of a range to the kernel.

    Args:
        x: What is rounded.
        amax: Its learned range.
        fmt: The number format.
    """
    return AVAILABLE and fused.knows(x, amax, fmt)


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
        return grad, None, range_gradient(grad, x, amax, *ctx.ends), None, None


if AVAILABLE:
    _operator: Any = torch.library.custom_op  # type: ignore[attr-defined]

    @_operator('mmdet3d_quant::range_gradient', mutates_args=(), schema=_SCHEMA)
    def range_gradient(grad: Any, x: Any, amax: Any, qmin: Any, qmax: Any) -> Any:
        """Computes the gradient of a learned range, as ``fake_quantize`` defines it.

        Args:
            grad: Gradient of what ``x`` was rounded to.
            x: What was rounded.
            amax: Its range, float32 of one element.
            qmin: Least step.
            qmax: Greatest step.

        Returns:
            Tensor like ``amax``.
        """
        x = x if fused.is_dense(x) else x.contiguous()
        return fused.slope(grad, x, amax, qmin, qmax)

    @range_gradient.register_fake
    def _(grad: Any, x: Any, amax: Any, qmin: Any, qmax: Any) -> Any:
        return torch.empty_like(amax)
