"""Calibration in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn

from mmdet3d_quant.calibration.calibrator import Calibrator
from mmdet3d_quant.calibration.observe import Forward
from mmdet3d_quant.calibration.plan import Plan, PlanLike
from mmdet3d_quant.calibration.result import Calibration, Correction


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    method: PlanLike = 'mse',
    forward: Forward | None = None,
    num_batches: int | None = None,
    *,
    weights: str = 'max',
    held_out: Iterable[Any] | None = None,
    after: Sequence[Correction] = (),
) -> Calibration:
    """Runs batches through the float model and sets the range of every quantizer.

    Activations are observed in eval mode without gradients; the statistics of tied quantizers
    are merged before their common range is computed. The model is left in mode ``quant``, its
    training flags as they were. When anything fails the model is as before.

    Args:
        model: A model with quantized layers, float weights loaded.
        batches: Batches, of whatever type ``forward`` takes.
        method: ``'max'``, ``'percentile'`` (99.99), ``'percentile:99.9'``, ``'entropy'``,
            ``'mse'`` or ``'auto'``: per quantizer, of those, the one with which the layer's
            output is least wrong on held-out batches. Or several for parts of the model, see
            :meth:`Plan.parse`.
        forward: ``forward(model, batch)`` runs the model. By default a tensor is passed as
            ``model(batch)``, a sequence as ``model(*batch)``, a dict as
            ``model.test_step(batch)`` where the model has one (mmengine) and else as
            ``model(**batch)``. It runs on a copy of the first batch, too.
        num_batches: Stop after so many; all by default.
        weights: Per output channel ``'max'``, the largest absolute weight, or ``'mse'``, the
            range with the least squared error.
        held_out: Batches for ``'auto'`` and ``after``; by default the last of ``batches``, which
            is then not among those that ranges are searched in.
        after: Steps after the ranges, in order.

    Returns:
        :class:`Calibration`, the ranges and their statistics.

    Raises:
        ValueError: If the method is unknown, ``num_batches`` < 1, ``batches`` is a single batch,
            nothing is quantized, or there is no batch to hold out.
        NonFiniteError: If a weight or tensor has NaN or infinity; names the first.
        CalibrationError: If there are no batches, or a quantizer was never reached or saw zeros
            only.
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f'num_batches must be at least 1, got {num_batches}')
    if isinstance(batches, (Tensor, Mapping, str)):
        raise ValueError(
            f'batches is a {type(batches).__name__}: give several batches, or one as [batch]'
        )
    calibrator = Calibrator(model, Plan.parse(method, weights), forward)
    numbered: Iterable[tuple[int, Any]] = enumerate(islice(batches, num_batches))
    kept: list[tuple[int, Any]] = []
    if (calibrator.needs_held_out or after) and held_out is None:
        numbered = _all_but_last(numbered, kept)
    for count, _ in enumerate(calibrator.observe(numbered), 1):
        if calibrator.stability.due(count):
            calibrator.look()
    if kept and not calibrator.statistics.batches:
        raise ValueError('at least 2 batches are needed: the last is held out; or give `held_out`')
    if held_out is not None:
        kept = [(-1 - i, batch) for i, batch in enumerate(held_out)]
    return calibrator.finish(kept, after)


def _all_but_last(items: Iterable[Any], last: list[Any]) -> Iterator[Any]:
    """All items but the last, which is put into a list."""
    for item in items:
        if last:
            yield last.pop()
        last.append(item)
