"""Moves of factors that float does not notice: applied, and every layer's output looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mmdet3d_quant.calibration.observe import Forward, run
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import deep_copy
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.improve.flow import Flow
from mmdet3d_quant.improve.moves import AnyMove, apply

#: Relative difference of a layer's output, summed, that rounding explains.
_ROUNDING = 1e-4


def watched(
    model: nn.Module, batch: Any, forward: Forward | None, flow: Callable[..., Flow] = Flow
) -> Flow:
    """Runs a batch; returns the flow of its forward.

    Args:
        model: Model in eval mode and mode ``float``.
        batch: The batch.
        forward: As ``calibrate`` takes it.
        flow: Makes the flow from the model.
    """
    with flow(model) as seen:
        seen.close((forward or run)(model, batch))
    return seen


def move_exactly(
    model: nn.Module, moves: Sequence[AnyMove], batch: Any, forward: Forward | None, what: str
) -> None:
    """Applies moves, makes sure that every layer computes what it did, and drops all ranges.

    Args:
        model: Model in eval mode and mode ``float``.
        moves: The moves.
        batch: A batch to run.
        forward: As ``calibrate`` takes it.
        what: What cannot be done to the model, for the error: subject and participle.

    Raises:
        QuantError: If a layer computes something else afterwards; the model is as before then.
    """

    def sizes() -> list[tuple[str, float]]:
        return watched(model, deep_copy(batch), forward).sizes

    before, again = sizes(), sizes()  # a GPU may add in another order each time
    apply(model, moves)
    # Of a layer with a factor by channel the sum says nothing; those that read it say it all.
    factors = {m.source: float(m.factor) if m.factor.dim() == 0 else math.nan for m in moves}
    odd = _difference(before, again, sizes(), factors)
    if odd:
        apply(model, moves, back=True)
        raise QuantError(
            f'{what} in {type(model).__name__}: {odd}, so something reads a '
            'scaled tensor that was not seen. Nothing was changed'
        )
    for quantizer in quantizers(model).values():
        quantizer.forget()


def _difference(
    before: list[tuple[str, float]],
    again: list[tuple[str, float]],
    after: list[tuple[str, float]],
    factors: dict[str, float],
) -> str:
    """Says which layer computes something else than before, of those that computed it twice."""
    if [name for name, _ in before] != [name for name, _ in after]:
        return 'other layers ran'
    for (name, old), (_, repeated), (_, new) in strict_zip(before, again, after):
        expected = old * factors.get(name, 1.0)
        told = _alike(old, repeated) and not math.isnan(expected)
        if told and not _alike(expected, new):
            return f'the output of {name} changed from {expected:.6g} to {new:.6g}, summed'
    return ''


def _alike(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_ROUNDING, abs_tol=1e-30)
