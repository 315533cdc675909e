"""Post-training calibration: from batches of data to a range for every quantizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.calibration.auto import least_output_error
from mmdet3d_quant.calibration.choose import CANDIDATES, Unit, search, suits, units
from mmdet3d_quant.calibration.health import examine, weak_weights
from mmdet3d_quant.calibration.histogram import NonFiniteError
from mmdet3d_quant.calibration.observe import (
    Forward,
    Statistics,
    activation_quantizers,
    observe,
    weight_layers,
)
from mmdet3d_quant.calibration.plan import Plan
from mmdet3d_quant.calibration.result import (
    CalibratedRange,
    Calibration,
    CalibrationError,
    Choice,
    Comparing,
    Correction,
)
from mmdet3d_quant.calibration.stability import TOLERANCE, Stability
from mmdet3d_quant.calibration.unsigned import note_unsigned_ranges
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import deep_copy
from mmdet3d_quant.core.coverage import coverage
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.modes import kept_float, quantizers, set_mode
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.core.skip import how_to_skip
from mmdet3d_quant.core.spec import Method
from mmdet3d_quant.core.ties import ties


class Calibrator:
    """Calibration in steps, for whoever wants to stop, go on or look between them.

    Observing and choosing are apart: the same statistics serve any method. With several
    processes each observes batches of its own, under numbers of their own; :meth:`look` and
    :meth:`finish` must then be called by all, and give all the same. Inference mode is left
    meanwhile: ranges are trained later.

    Args:
        model: A model with quantized layers, float weights loaded.
        plan: Methods.
        forward: See :func:`calibrate`.
        tolerance: Relative change below which a range has settled.

    Raises:
        ValueError: If nothing is quantized, or a pattern of the plan fits nothing.
        NonFiniteError: If a weight is NaN or infinite.
        QuantError: If the model was built in ``torch.inference_mode()``.
    """

    @torch.inference_mode(False)
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
        made = [n for n, q in quantizers(model).items() if _is_inference(q._amax)]
        if made:
            raise QuantError(
                f'{made[0]}._amax and {len(made) - 1} more were made in torch.inference_mode(), '
                'where no range can be set for training: build and move the model outside of it'
            )
        bad = weak_weights(model)
        if bad:
            raise NonFiniteError(f'the model cannot be calibrated: {"; ".join(bad[:5])}')
        self._methods = plan.methods(self._active)
        for name, method in self._methods.items():
            if not suits(method, self._active[name].spec):
                raise ValueError(
                    f'{name} is {self._active[name].spec.format.name}, whose numbers are not one '
                    f'step apart, as {method} needs them: take mse'
                )
        self.groups = ties(model)
        self.statistics = Statistics(self._active)
        self.stability = Stability(tolerance)
        self.macs: dict[str, int] = {}

    @property
    def needs_held_out(self) -> bool:
        """Whether :meth:`finish` needs batches of its own: for ``auto``."""
        return any(method.name == 'auto' for method in self._methods.values())

    @torch.inference_mode(False)
    def observe(self, batches: Iterable[tuple[int, Any]]) -> Iterator[int]:
        """Lets the quantizers see numbered batches; yields each number when it is in.

        Raises:
            NonFiniteError: If a tensor has NaN or infinity; names the first quantizer.
        """
        yield from observe(self.model, batches, self.statistics, self.forward, self.macs)

    @torch.inference_mode(False)
    def look(self) -> bool:
        """Compares the ranges with those of the last look; tells whether they have settled."""
        total = self.statistics.gathered()
        self.stability.look(len(total.batches), search(self._units(total)))
        return self.stability.settled_at is not None

    @torch.inference_mode(False)
    def finish(
        self, held_out: Iterable[tuple[int, Any]] = (), after: Sequence[Correction] = ()
    ) -> Calibration:
        """Sets all ranges, and mode ``quant``.

        Args:
            held_out: Numbered batches for the method ``auto`` and for ``after``, not among those
                observed.
            after: Steps to apply to the calibrated model, in order.

        Returns:
            :class:`Calibration`, the ranges and their statistics.

        Raises:
            CalibrationError: If there were no batches, or a quantizer was never reached or saw
                zeros only. The model is unchanged then.
        """
        total = self.statistics.gathered()
        self._check(total)
        self.statistics = total
        chosen = self._units(total)
        ranges = search(chosen)
        self.stability.look(len(total.batches), ranges)
        batches = held_out if not after else list(held_out)
        known = quantizers(self.model)
        with _unchanged_on_error(self.model, weights=bool(after)):
            for name, layer in self._weights.items():
                known[name].amax = layer.weight_amax(self.plan.weights)
            choices = self._choices(chosen, ranges, batches)
            for choice in choices:
                for name in choice.unit.names:
                    self._active[name].amax = choice.amax
            note_unsigned_ranges(choices, self._active)
            set_mode(self.model, 'quant')
            self._apply(after, choices, list(batches))
        return self._result(choices)

    def _apply(
        self, after: Sequence[Correction], choices: list[Choice], held_out: list[tuple[int, Any]]
    ) -> None:
        exact: nn.Module | None = None
        for correct in after:
            if not isinstance(correct, Comparing):
                exact = None
                correct(self.model, choices, list(held_out))
                continue
            correct.exact = exact = exact or deep_copy(self.model)
            try:
                correct(self.model, choices, list(held_out))
            finally:
                correct.exact = None

    def _units(self, total: Statistics) -> list[Unit]:
        specs = {name: q.spec for name, q in self._active.items()}
        known = {n: q.known for n, q in self._active.items() if q.known and not self.plan.names(n)}
        return units(total, self.groups, self._methods, specs, known)

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
                    + '\nRemove the layers, or keep them float: '
                    + how_to_skip(self.model, self._layers_of(names), quantizers(self.model))
                )

    def _layers_of(self, names: list[str]) -> list[str]:
        """Names of quantizers, and of those of the weights beside them."""
        known = quantizers(self.model)
        layers = {name.rpartition('.')[0] for name in names if name.endswith('_input_quantizer')}
        return [n for n in known if n in names or n.rpartition('.')[0] in layers]

    def _choices(
        self, chosen: list[Unit], ranges: list[float], held_out: Iterable[tuple[int, Any]]
    ) -> list[Choice]:
        """The range and method of each unit; for ``auto``, the candidate with least error."""
        choices = [Choice(u, amax, _how(u)) for u, amax in strict_zip(chosen, ranges)]
        left = [i for i, u in enumerate(chosen) if u.method.name == 'auto' and not u.known]
        if not left:
            return choices
        tried: list[list[tuple[Method, float]]] = [[] for _ in left]
        for method in CANDIDATES:
            suited = [n for n, i in enumerate(left) if suits(method, chosen[i].spec)]
            found = search([chosen[left[n]] for n in suited], method)
            for n, amax in strict_zip(suited, found):
                tried[n].append((method, amax))
        candidates = [
            (chosen[i].names, [amax for _, amax in pairs]) for i, pairs in strict_zip(left, tried)
        ]
        best = least_output_error(self.model, candidates, held_out, self.forward)
        for i, winner, pairs in strict_zip(left, best, tried):
            method, amax = pairs[winner]
            choices[i] = Choice(chosen[i], amax, f'auto: {method}')
        return choices

    def _result(self, choices: list[Choice]) -> Calibration:
        group_of = {n: i for i, group in enumerate(self.groups) for n in group}
        by_name = {}
        for choice in choices:
            for name in choice.unit.names:
                h = self.statistics.histograms[name]
                peaks = self.statistics.peaks.get(name)
                by_name[name] = CalibratedRange(
                    name,
                    choice.amax,
                    choice.method,
                    h.amax,
                    h.num_elements,
                    h.num_tensors,
                    group_of.get(name),
                    examine(h, choice.amax, choice.unit.spec, peaks),
                    peaks.batch if peaks else None,
                    choice.unit.spec.format.name,
                )
        return Calibration(
            str(self.plan),
            len(self.statistics.batches),
            tuple(by_name[name] for name in self._active),
            len(self._weights),
            tuple(self.groups),
            kept_float(self.model),
            tuple(self.stability.looks),
            self.stability.settled_at,
            self.statistics,
            coverage(self.model, self.macs),
        )


def _how(unit: Unit) -> str:
    return f'known: {unit.known.reason}' if unit.known else str(unit.method)


def _is_inference(amax: Tensor | None) -> bool:
    return amax is not None and amax.is_inference()


@contextmanager
def _unchanged_on_error(model: nn.Module, weights: bool) -> Iterator[None]:
    """Gives quantizers their ranges and modes back when something fails; if asked, weights too."""
    before: list[tuple[Quantizer, Tensor | None, bool, tuple[bool, ...]]] = [
        (q, copy.deepcopy(q._amax), q.calibrated, q.switches) for q in quantizers(model).values()
    ]
    state = copy.deepcopy(model.state_dict()) if weights else None
    try:
        yield
    except BaseException:
        if state is not None:
            for name, value in model.state_dict().items():
                value.copy_(state[name])
        for quantizer, amax, calibrated, switches in before:
            if amax is not None:
                quantizer._amax.copy_(amax)
                quantizer._calibrated = calibrated
            quantizer.switches = switches
        raise
