"""Calibration in one call."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
from mmengine.dist import all_gather_object, get_dist_info, get_world_size
from torch import Tensor, nn

from mmdet3d_quant.calibration.calibrator import Calibrator
from mmdet3d_quant.calibration.eager import uncompiled
from mmdet3d_quant.calibration.observe import Forward, Statistics
from mmdet3d_quant.calibration.plan import Plan, PlanLike
from mmdet3d_quant.calibration.result import Calibration, Correction

#: By default the last batches, one in so many, are held out for ``'auto'`` and ``after``.
HELD_OUT = 8


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    method: PlanLike = 'mse',
    forward: Forward | None = None,
    num_batches: int | None = None,
    *,
    weights: str | None = None,
    held_out: Iterable[Any] | None = None,
    after: Sequence[Correction] = (),
) -> Calibration:
    """Runs batches through the float model and sets the range of every quantizer.

    Activations are observed in eval mode without gradients; the statistics of tied quantizers
    are merged before their common range is computed. The model is left in mode ``quant``, its
    training flags as they were. When anything fails the model is as before.

    Under torch.distributed all processes call this, each with its share of the batches, such as
    ``batches[rank::world_size]``; shares may differ in length. All get the ranges and the count
    of all batches together. Batches that are the same in all processes count once, with a warning.

    Args:
        model: A model with quantized layers, float weights loaded; parts that ``torch.compile``
            made run as they were before it.
        batches: Batches, of whatever type ``forward`` takes.
        method: ``'max'``, ``'percentile'`` (99.99), ``'percentile:99.9'``, ``'entropy'``,
            ``'mse'`` or ``'auto'``: per quantizer, of those, the one with which the layer's
            output is least wrong on held-out batches. Or several for parts of the model, see
            :meth:`Plan.parse`.
        forward: ``forward(model, batch)`` runs the model. By default a tensor is passed as
            ``model(batch)``, a sequence as ``model(*batch)``, a dict as
            ``model.test_step(batch)`` where the model has one (mmengine) and else as
            ``model(**batch)``. It runs on a copy of the first batch, too.
        num_batches: Stop after so many of this process; all by default.
        weights: Per output channel ``'max'``, the largest absolute weight, or ``'mse'``, the
            range with the least squared error.
        held_out: Batches for ``'auto'`` and ``after``; by default the last of ``batches``, one in
            :data:`HELD_OUT` and at least one, which are then not among those that ranges are
            searched in. Of several processes each has its own.
        after: Steps after the ranges, in order.

    Returns:
        :class:`Calibration`, the ranges and their statistics.

    Raises:
        ValueError: If the method is unknown, ``num_batches`` < 1, ``batches`` is a single batch,
            nothing is quantized, or there is no batch to hold out.
        NonFiniteError: If a weight or tensor has NaN or infinity; names the first.
        QuantError: If the model was built in ``torch.inference_mode()``, which is left meanwhile.
        CalibrationError: If there are no batches, or a quantizer was never reached or saw zeros
            only.
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f'num_batches must be at least 1, got {num_batches}')
    if isinstance(batches, (Tensor, Mapping, str)):
        raise ValueError(
            f'batches is a {type(batches).__name__}: give several batches, or one as [batch]'
        )
    plan = Plan.parse(method, weights)
    with uncompiled(model) as plain:
        result, same = _calibrate(plain, batches, plan, forward, num_batches, held_out, after)
    if same:
        warnings.warn(
            'calibrate: all processes were given the same batches, which count once. To go faster '
            'give each its share, as batches[rank::world_size] is',
            stacklevel=2,
        )
    return result


def _calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    plan: Plan,
    forward: Forward | None,
    num_batches: int | None,
    held_out: Iterable[Any] | None,
    after: Sequence[Correction],
) -> tuple[Calibration, bool]:
    """Calibrates; tells also whether all processes were given the same batches."""
    calibrator = Calibrator(model, plan, forward)
    calibrator.statistics = given = _Given(calibrator.statistics.histograms)
    rank, world = get_dist_info()
    numbered = _numbered(islice(batches, num_batches), rank, world)
    kept: list[tuple[int, Any]] = []
    if (calibrator.needs_held_out or after) and held_out is None:
        numbered = _all_but_last(numbered, kept)
    _observe(calibrator, numbered, world)
    if kept and world == 1 and not given.batches:
        raise ValueError('at least 2 batches are needed: the last is held out; or give `held_out`')
    if held_out is not None:
        kept = [(-1 - number, batch) for number, batch in _numbered(held_out, rank, world)]
    return calibrator.finish(kept, after), given.same


def _numbered(batches: Iterable[Any], rank: int, world: int) -> Iterator[tuple[int, Any]]:
    """Numbers batches so that no two processes have the same number."""
    return ((rank + world * i, batch) for i, batch in enumerate(batches))


def _observe(calibrator: Calibrator, batches: Iterable[tuple[int, Any]], world: int) -> None:
    """Observes all batches; looks at the same times in all processes, whoever has more."""
    steps = calibrator.observe(batches)
    for turn in count(1):
        done = next(steps, None) is None
        if world == 1 and done:
            return
        if calibrator.stability.due(turn):
            if world > 1 and all(all_gather_object(done)):
                return
            calibrator.look()


class _Given(Statistics):
    """Statistics of batches that a caller gave to each process: its share, or all of them.

    Attributes:
        same: Whether the statistics of all processes were the same when they were last merged.
    """

    same = False

    def gathered(self) -> Statistics:
        """Merges the statistics of all processes; takes one's where all are the same."""
        self.same = get_world_size() > 1 and len(set(all_gather_object(self._digest()))) == 1
        if not self.same:
            return super().gathered()
        total = Statistics(self.histograms)
        total.merge(self)
        return total

    def _digest(self) -> str:
        found = hashlib.sha256()
        for histogram in self.histograms.values():
            for value in histogram.state_dict().values():
                found.update(np.asarray(value).tobytes())
        return found.hexdigest()


def _all_but_last(items: Iterable[Any], last: list[Any]) -> Iterator[Any]:
    """Yields all items but the last, as many as :func:`num_held_out` tells, left in a list."""
    for number, item in enumerate(items, 1):
        last.append(item)
        while len(last) > num_held_out(number):
            yield last.pop(0)


def num_held_out(num_batches: int) -> int:
    """Counts the batches that are held out of so many by default."""
    return max(1, num_batches // HELD_OUT)
