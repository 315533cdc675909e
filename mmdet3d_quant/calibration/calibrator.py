"""Post-training calibration: from batches of data to a range for every quantizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from mmdet3d_quant.calibration.auto import least_output_error
from mmdet3d_quant.calibration.health import Health, examine, weak_weights
from mmdet3d_quant.calibration.histogram import NonFiniteError
from mmdet3d_quant.calibration.observe import (
    Forward,
    Statistics,
    activation_quantizers,
    observe,
    weight_layers,
)
from mmdet3d_quant.calibration.plan import Plan, PlanLike
from mmdet3d_quant.calibration.ranges import CANDIDATES, Unit, search, units
from mmdet3d_quant.calibration.stability import TOLERANCE, Look, Stability
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.modes import quantizers, set_mode
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.core.ties import ties


class CalibrationError(QuantError):
    """Calibration could not give every quantizer a range; the model is unchanged."""


@dataclass(frozen=True)
class CalibratedRange:
    """What calibration found for one activation quantizer.

    Attributes:
        name: Name of the quantizer in the model.
        amax: Its range limit.
        method: How it was chosen; of ``auto`` also what won.
        largest: Largest absolute value that it saw itself.
        num_elements: Number of values that it saw.
        num_tensors: Number of tensors that it saw; one a batch, but for a concat's.
        group: Index of its tie group in ``Calibration.groups``, or None.
        health: How its own tensors fit the range.
    """

    name: str
    amax: float
    method: str
    largest: float
    num_elements: int
    num_tensors: int
    group: int | None
    health: Health


@dataclass(frozen=True)
class Calibration:
    """Result of :func:`calibrate`.

    Attributes:
        method: The method or methods, as text.
        num_batches: Batches seen, by all processes.
        ranges: One entry per activation quantizer, in the order of the model.
        num_weights: Number of weight quantizers, calibrated per channel from the weights.
        groups: Names of the quantizers that share a scale.
        kept_float: Name and reason of the quantizers kept float.
        looks: How the ranges moved with the number of batches.
        settled_at: Batches after which they moved no more, or None.
        statistics: What the ranges were chosen from.
    """

    method: str
    num_batches: int
    ranges: tuple[CalibratedRange, ...]
    num_weights: int
    groups: tuple[tuple[str, ...], ...]
    kept_float: dict[str, str]
    looks: tuple[Look, ...]
    settled_at: int | None
    statistics: Statistics


class Calibrator:
    """Calibration in steps, for whoever wants to stop, go on or look between them.

    Observing and choosing are apart: the same statistics serve any method. With several
    processes each observes batches of its own; :meth:`look` and :meth:`finish` must then be
    called by all, and give all the same.

    Args:
        model: A model with quantized layers, float weights loaded.
        plan: Methods.
        forward: See :func:`calibrate`.
        tolerance: Relative change below which a range has settled.

    Raises:
        ValueError: If nothing is quantized, or a pattern of the plan fits nothing.
        NonFiniteError: If a weight is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        forward: Forward | None = None,
        tolerance: float = TOLERANCE,
    ) -> None:
        self.model, self.plan, self.forward = model, plan, forward
        self._active = activation_quantizers(model)
        self._weights = weight_layers(model)
        if not self._active and not self._weights:
            raise ValueError(
                f'{type(model).__name__} has no quantized layers: use Quant* types in its config'
            )
        bad = weak_weights(model)
        if bad:
            raise NonFiniteError(f'the model cannot be calibrated: {"; ".join(bad[:5])}')
        self._methods = plan.methods(self._active)
        self.groups = ties(model)
        self.statistics = Statistics(self._active)
        self.stability = Stability(tolerance)

    @property
    def needs_held_out(self) -> bool:
        """Whether :meth:`finish` needs batches of its own: for ``auto``."""
        return any(method.name == 'auto' for method in self._methods.values())

    def observe(self, batches: Iterable[tuple[int, Any]]) -> Iterator[int]:
        """Lets the quantizers see numbered batches; yields each number when it is in.

        Raises:
            NonFiniteError: If a tensor has NaN or infinity; names the first quantizer.
        """
        yield from observe(self.model, batches, self.statistics, self.forward)

    def look(self) -> bool:
        """Compares the ranges with those of the last look; tells whether they have settled."""
        total = self.statistics.gathered()
        self.stability.look(len(total.batches), search(self._units(total)))
        return self.stability.settled_at is not None

    def finish(self, held_out: Iterable[tuple[int, Any]] = ()) -> Calibration:
        """Sets all ranges, and mode ``quant``.

        Args:
            held_out: Numbered batches for the method ``auto``, not among those observed.

        Returns:
            What was calibrated.

        Raises:
            CalibrationError: If there were no batches, or a quantizer was never reached or saw
                zeros only. The model is unchanged then.
        """
        total = self.statistics.gathered()
        self._check(total)
        self.statistics = total
        found = self._units(total)
        ranges = search(found)
        self.stability.look(len(total.batches), ranges)
        with _unchanged_on_error(self.model):
            for name, layer in self._weights.items():
                quantizers(self.model)[name].amax = layer.weight_amax(self.plan.weights)
            texts = self._choose(found, ranges, held_out)
            for unit, amax in strict_zip(found, ranges):
                for name in unit.names:
                    self._active[name].amax = amax
            set_mode(self.model, 'quant')
        return self._result(found, ranges, texts)

    def _units(self, total: Statistics) -> list[Unit]:
        specs = {name: q.spec for name, q in self._active.items()}
        return units(total, self.groups, self._methods, specs)

    def _check(self, total: Statistics) -> None:
        if not total.batches:
            raise CalibrationError('there are no batches to calibrate on: the data set is empty')
        unused = {
            'were never reached by the data': [
                n for n, h in total.histograms.items() if h.num_tensors == 0
            ],
            'saw nothing but zeros': [
                n for n, h in total.histograms.items() if h.num_tensors and h.amax == 0
            ],
        }
        for what, names in unused.items():
            if names:
                raise CalibrationError(
                    f'{len(names)} quantizer(s) {what}:\n  '
                    + '\n  '.join(names[:20])
                    + "\nRemove the layers, or keep them float with `skip` in the model's config"
                )

    def _choose(
        self, found: list[Unit], ranges: list[float], held_out: Iterable[tuple[int, Any]]
    ) -> list[str]:
        """Decides what ``auto`` left open, in ``ranges``; returns the methods as text."""
        texts = [str(unit.method) for unit in found]
        open_ = [i for i, unit in enumerate(found) if unit.method.name == 'auto']
        if not open_:
            return texts
        left = [found[i] for i in open_]
        tried = list(strict_zip(*(search(left, method) for method in CANDIDATES)))
        candidates = [(u.names, list(t)) for u, t in strict_zip(left, tried)]
        chosen = least_output_error(self.model, candidates, held_out, self.forward)
        for i, best, values in strict_zip(open_, chosen, tried):
            ranges[i], texts[i] = values[best], f'auto: {CANDIDATES[best]}'
        return texts

    def _result(self, found: list[Unit], ranges: list[float], texts: list[str]) -> Calibration:
        group_of = {n: i for i, group in enumerate(self.groups) for n in group}
        by_name = {}
        for unit, amax, text in strict_zip(found, ranges, texts):
            for name in unit.names:
                h = self.statistics.histograms[name]
                by_name[name] = CalibratedRange(
                    name,
                    amax,
                    text,
                    h.amax,
                    h.num_elements,
                    h.num_tensors,
                    group_of.get(name),
                    examine(h, amax, unit.spec),
                )
        kept_float = {
            n: q.float_reason
            for n, q in quantizers(self.model).items()
            if q.float_reason is not None
        }
        return Calibration(
            str(self.plan),
            len(self.statistics.batches),
            tuple(by_name[name] for name in self._active),
            len(self._weights),
            tuple(self.groups),
            kept_float,
            tuple(self.stability.looks),
            self.stability.settled_at,
            self.statistics,
        )


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    method: PlanLike = 'mse',
    forward: Forward | None = None,
    num_batches: int | None = None,
    *,
    weights: str = 'max',
    held_out: Iterable[Any] | None = None,
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
            ``model(**batch)``.
        num_batches: Stop after so many; all by default.
        weights: Per output channel ``'max'``, the largest absolute weight, or ``'mse'``, the
            range with the least squared error.
        held_out: Batches for ``'auto'``; by default the last of ``batches``, which is then not
            among those that ranges are searched in.

    Returns:
        What was calibrated.

    Raises:
        ValueError: If the method is unknown, ``num_batches`` < 1, nothing is quantized, or there
            is no batch to hold out.
        NonFiniteError: If a weight or tensor has NaN or infinity; names the first.
        CalibrationError: If there are no batches, or a quantizer was never reached or saw zeros
            only.
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f'num_batches must be at least 1, got {num_batches}')
    calibrator = Calibrator(model, Plan.parse(method, weights), forward)
    numbered: Iterable[tuple[int, Any]] = enumerate(islice(batches, num_batches))
    kept: list[tuple[int, Any]] = []
    if calibrator.needs_held_out and held_out is None:
        numbered = _all_but_last(numbered, kept)
    for count, _ in enumerate(calibrator.observe(numbered), 1):
        if calibrator.stability.due(count):
            calibrator.look()
    if held_out is not None:
        kept = [(-1 - i, batch) for i, batch in enumerate(held_out)]
    return calibrator.finish(kept)


def _all_but_last(items: Iterable[Any], last: list[Any]) -> Iterator[Any]:
    """All items but the last, which is put into a list."""
    for item in items:
        if last:
            yield last.pop()
        last.append(item)


@contextmanager
def _unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Gives the quantizers back their ranges and modes when something fails."""
    before: list[tuple[Quantizer, Tensor | None, bool, tuple[bool, ...]]] = [
        (q, copy.deepcopy(q._amax), q.calibrated, q.switches) for q in quantizers(model).values()
    ]
    try:
        yield
    except BaseException:
        for quantizer, amax, calibrated, switches in before:
            if amax is not None:
                quantizer._amax.copy_(amax)
                quantizer._calibrated = calibrated
            quantizer.switches = switches
        raise
