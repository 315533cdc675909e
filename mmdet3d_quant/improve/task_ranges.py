"""Task-guided ranges: moved so that the final maps are least wrong where there are objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from mmengine.dist import all_gather_object
from torch import Tensor, nn

from mmdet3d_quant.calibration.gather import gather_batches
from mmdet3d_quant.calibration.observe import Forward, run
from mmdet3d_quant.calibration.result import Choice
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import deep_copy, tensors
from mmdet3d_quant.core.maps import heads, judged_maps, relative_noise
from mmdet3d_quant.core.modes import evaluating, quantizers, set_mode
from mmdet3d_quant.core.spec import select_all
from mmdet3d_quant.core.ties import ties
from mmdet3d_quant.core.unsigned import set_unsigned_amax, unsigned_amax, unsigned_ranges
from mmdet3d_quant.runs.listener import Listener

#: Factors that are tried on a range, each again and again while it helps; coarse ones first.
FACTORS = ((0.5, 2.0), (0.8, 1.25))
#: Share of its error that a move has to take off the maps.
LEAST_GAIN = 0.002
#: Share of the cells of a heatmap that count as positive.
POSITIVE = 0.02

_WHO = 'task-guided ranges need'


class TaskRanges:
    """Step after the ranges that moves those of activations by the error of the final maps.

    One tie group after the other is multiplied by :data:`FACTORS` for as long as the maps by which
    the detector is judged come closer to those of float. Only the cells count where the float
    model's heatmap is highest (LiDAR-PTQ's positive positions); all of them of a map that has no
    heatmap of its size. The last held-out batch judges: if the maps are not better on that, all
    ranges are as before. With a single batch it judges itself. Weights stay. To be done before
    :class:`LearnedRounding`, which learns for the ranges that it finds.

    A move costs a forward per held-out batch, four at least per tie group. Several processes share
    the batches and find the same ranges.

    Args:
        patterns: Names of layers or quantizers, see :func:`mmdet3d_quant.core.spec.select`; a tie
            group moves if one of its members is named.
        rounds: How often all groups are visited.
        batches: Most held-out batches of a process to look at.
        forward: See :func:`mmdet3d_quant.calibrate`.
        listener: Told how many groups are done.

    Attributes:
        moved: Factor by quantizer.
        noise: Relative squared error of the maps on the judging batch, before and after.
        positive: Whether a heatmap told which cells count.
        undone: Whether the moves were taken back.
    """

    def __init__(
        self,
        patterns: Sequence[str] = ('*',),
        rounds: int = 1,
        batches: int = 4,
        forward: Forward | None = None,
        listener: Listener | None = None,
    ) -> None:
        if min(rounds, batches) < 1:
            raise ValueError(
                f'task-guided ranges: rounds and batches must be at least 1, got {rounds} and '
                f'{batches}'
            )
        self.patterns, self.rounds, self.batches = list(patterns), rounds, batches
        self.forward, self.listener = forward or run, listener or Listener()
        self.moved: dict[str, float] = {}
        self.noise = (0.0, 0.0)
        self.positive = self.undone = False

    def groups(self, model: nn.Module) -> list[tuple[str, ...]]:
        """Finds what moves together: tie groups and single quantizers that the patterns name.

        A range that is known without data stays.

        Raises:
            ValueError: If a pattern names no quantizer of an activation.
        """
        own = {
            name: q
            for name, q in quantizers(model).items()
            if q.float_reason is None and not name.endswith('_weight_quantizer')
        }
        what = 'quantizer of an activation'
        chosen = set(select_all(own, self.patterns, what, 'task-guided ranges'))
        group_of = {name: group for group in ties(model) for name in group}
        found = dict.fromkeys(group_of.get(name, (name,)) for name in own if name in chosen)
        return [group for group in found if not any(own[name].known for name in group)]

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, choices: list[Choice], held_out: list[tuple[int, Any]]
    ) -> None:
        """Moves the ranges of a calibrated model in place; with several processes all alike.

        Args:
            model: Calibrated.
            choices: The ranges that were chosen; those that move are replaced in the list.
            held_out: Numbered batches.

        Raises:
            ValueError: If a pattern names nothing, or there is no batch.
            QuantError: If the model has no map to be judged by.
        """
        groups = self.groups(model)
        known: dict[str, Any] = quantizers(model)
        before = {name: known[name].amax.clone() for group in groups for name in group}
        with set_mode(model, 'quant'), evaluating(model):
            judge = _Judge(model, held_out[: self.batches], self.forward)
            self.positive, self.undone = judge.positive, False
            first = judge.noise(judged=True)
            factors = {group: 1.0 for group in groups}

            def move(group: tuple[str, ...], factor: float) -> float:
                _scale(model, group, before, factor)
                return judge.noise()

            best = judge.noise()
            with self.listener.counting('Moving ranges', len(groups) * self.rounds) as count:
                for turn in range(self.rounds):
                    for at, group in enumerate(groups):
                        factors[group], best = _descend(group, factors[group], best, move)
                        _scale(model, group, before, factors[group])
                        count(turn * len(groups) + at + 1)
            last = judge.noise(judged=True)
        if not last < first:
            self.undone = any(factor != 1 for factor in factors.values())
            for group in groups:
                _scale(model, group, before, 1.0)
            factors = {group: 1.0 for group in groups}
        self.noise = first, last
        self.moved = {n: f for group, f in factors.items() if f != 1 for n in group}
        for at, choice in enumerate(choices):
            factor = self.moved.get(choice.unit.names[0])
            if factor is not None:
                amax, how = float(known[choice.unit.names[0]].amax), choice.method
                choices[at] = replace(choice, amax=amax, method=f'{how}, task x {factor:.3g}')

    def __str__(self) -> str:
        where = 'where the float heatmap is highest' if self.positive else 'in all cells'
        first, last = self.noise
        if self.undone:
            return (
                f'task-guided ranges: undone, on the batch that judges the maps would be '
                f'{last:.3g} wrong {where}, not {first:.3g}'
            )
        return (
            f'task-guided ranges: {len(self.moved)} moved; the maps are {last:.3g} wrong {where}, '
            f'before {first:.3g}'
        )


def _descend(
    group: tuple[str, ...],
    factor: float,
    best: float,
    move: Callable[[tuple[str, ...], float], float],
) -> tuple[float, float]:
    """Walks from the factor of a group by each of :data:`FACTORS` while that helps.

    The walks down and up are both made before the better end is taken: the error has dents in
    which a walk that turned at the better neighbour would stay.
    """
    for ratios in FACTORS:
        ends = [(best, factor)]
        for ratio in ratios:
            error, end = best, factor
            while (tried := move(group, end * ratio)) < error * (1 - LEAST_GAIN):
                error, end = tried, end * ratio
            ends.append((error, end))
        best, factor = min(ends)
    return factor, best


def _scale(model: nn.Module, group: tuple[str, ...], before: Any, factor: float) -> None:
    """Sets the ranges of a group to a multiple of what they were; those of UINT8 follow."""
    known = quantizers(model)
    noted = unsigned_ranges(model)
    for name in group:
        quantizer = known[name]
        ratio = unsigned_amax(quantizer) / max(float(quantizer._amax), 1e-30)
        quantizer.amax = before[name] * factor
        if name in noted:
            set_unsigned_amax(quantizer, float(quantizer._amax) * ratio)


class _Judge:
    """The float model's maps on batches, and how far the quantized ones are from them.

    Attributes:
        positive: Whether there is a heatmap.
    """

    def __init__(self, model: nn.Module, batches: list[tuple[int, Any]], forward: Forward) -> None:
        self._model, self._forward = model, forward
        self._batches = dict(batches)
        self._exact: dict[int, list[Tensor]] = {}
        self._masks: dict[int, list[Tensor | None]] = {}
        self.positive = False
        with set_mode(model, 'float'):
            for number in self._batches:
                with _heatmaps(model) as scores:
                    maps = self._maps(number)
                self._exact[number] = maps
                self._masks[number] = [_mask(m, scores) for m in maps]
                self.positive |= any(m is not None for m in self._masks[number])
        self.positive = any(all_gather_object(self.positive))
        numbers = list(gather_batches({number: None for number in self._batches}, _WHO))
        self._last = numbers[-1]
        self._others = set(numbers[:-1] or numbers)

    def noise(self, judged: bool = False) -> float:
        """Measures the relative squared error of the maps, mean of batches of all processes."""
        wanted = {self._last} if judged else self._others
        own = {}
        for number in (n for n in self._batches if n in wanted):
            pairs = [
                (m, e) if mask is None else (m * mask, e * mask)
                for m, e, mask in strict_zip(
                    self._maps(number), self._exact[number], self._masks[number]
                )
            ]
            own[number] = relative_noise([m for m, _ in pairs], [e for _, e in pairs])
        found = gather_batches(own, _WHO)
        return sum(found.values()) / len(found)

    def _maps(self, number: int) -> list[Tensor]:
        with judged_maps(self._model) as judged:
            output = self._forward(self._model, deep_copy(self._batches[number]))
            return [m.detach().clone() for m in judged.returned(output)]


@contextmanager
def _heatmaps(model: nn.Module) -> Iterator[list[Tensor]]:
    """Keeps what heads return under a name with ``heatmap``, (batch, classes, height, width)."""
    found: list[Tensor] = []

    def hook(head: nn.Module, args: Any, output: Any) -> None:
        found.extend(x for x in _named(output) if x.dim() == 4)

    handles = [head.register_forward_hook(hook) for head in heads(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _named(value: Any) -> Iterator[Tensor]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _named(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if 'heatmap' in str(key):
                yield from tensors(item)


def _mask(x: Tensor, scores: list[Tensor]) -> Tensor | None:
    """1 in the highest cells of each sample's heatmaps of a map's size; None without these."""
    fitting = [s for s in scores if x.dim() == 4 and s.shape[-2:] == x.shape[-2:]]
    fitting = [s for s in fitting if len(s) == len(x)]
    if not fitting:
        return None
    cells = torch.cat(fitting, 1).amax(1).flatten(1)
    picked = cells.topk(max(1, int(POSITIVE * cells.shape[1])), 1).indices
    mask = torch.zeros_like(cells).scatter_(1, picked, 1)
    return mask.view(len(x), 1, *x.shape[-2:])
