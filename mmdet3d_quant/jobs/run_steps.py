"""Steps beside the ranges in one calibration: made, checked, run and told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from mmdet3d_quant.calibration.health import LEAST_BITS
from mmdet3d_quant.calibration.result import Correction
from mmdet3d_quant.core.spec import QuantSpec
from mmdet3d_quant.improve import Equalization
from mmdet3d_quant.jobs.steps import BY_NAME, Before, Chosen, Setup, check
from mmdet3d_quant.jobs.told import Told


class Steps:
    """The steps of one calibration.

    Args:
        chosen: Patterns by name, in their order.
        setup: What they may need.

    Attributes:
        before: Name and patterns of those before the ranges.
        after: Those behind them, by name.
        results: What those before the ranges did, by name.
    """

    def __init__(self, chosen: Chosen, setup: Setup) -> None:
        made = {name: BY_NAME[name].make(patterns, setup) for name, patterns in chosen.items()}
        self._chosen, self._made = chosen, made
        self.before = {k: v for k, v in chosen.items() if isinstance(made[k], Before)}
        self.after: dict[str, Correction] = {k: v for k, v in made.items() if k not in self.before}
        self.results: dict[str, Any] = {}

    def check(self, model: nn.Module) -> None:
        """Checks their patterns, before the long run.

        Raises:
            ValueError: If one of them names nothing.
        """
        for made in self._made.values():
            check(made, model)

    def __str__(self) -> str:
        texts = (f'{name} ({", ".join(patterns)})' for name, patterns in self._chosen.items())
        return f'steps beside the ranges: {", ".join(texts) or "none"}'

    def move(
        self, model: nn.Module, batches: Callable[[], Iterable[Any]], told: Told
    ) -> Equalization | None:
        """Runs those before the ranges, and reports what they did.

        Args:
            model: The model, changed in place.
            batches: Loads a few batches, the same in all processes.
            told: Receives the report.

        Returns:
            What was done to concats, if that was asked for.
        """
        for name, patterns in self.before.items():
            result = self._made[name].run(model, batches(), patterns)
            self.results[name] = result
            told.listener.note(str(result))
            for move in result.moves:
                told.listener.note(str(move))
            for left in result.left if isinstance(result, Equalization) else ():
                few = left.refused and left.bits > QuantSpec().format.bits - LEAST_BITS
                (told.warn if few else told.listener.note)(str(left))
        return self.results.get('equalize_concats')

    def lines(self) -> list[str]:
        """Says what each of them did, a line each."""
        return [f'{name} ({", ".join(self._chosen[name])}): {done}' for name, done in self._done()]

    def record(self, meta: dict[str, Any]) -> None:
        """Writes what they did into the ``meta`` of a checkpoint."""
        meta['steps'] = self._chosen
        for name, done in self._done():
            step = BY_NAME[name]
            meta[step.meta] = step.record(done, meta.get(step.meta, []))

    def _done(self) -> Iterator[tuple[str, Any]]:
        """Yields names and what tells what was done: results before the ranges, steps behind."""
        yield from self.results.items()
        yield from self.after.items()
