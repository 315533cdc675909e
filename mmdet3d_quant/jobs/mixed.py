"""The config that keeps just enough units float: searched, written, built anew and checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmdet3d_quant.core.decibels import decibels
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.modes import kept_float, quantizers
from mmdet3d_quant.core.skip import covering
from mmdet3d_quant.jobs.bench_tasks import Recipe, Task, Tasks
from mmdet3d_quant.jobs.skip_config import write_skip_config
from mmdet3d_quant.sensitivity.cost import Costs, Total, plain
from mmdet3d_quant.sensitivity.measure import Bench
from mmdet3d_quant.sensitivity.search import Step, shortest
from mmdet3d_quant.sensitivity.units import Unit, float_quantizers

#: Why layers are float in a written config.
REASON = 'sensitivity: {share:.1%} of the noise at the head'


@dataclass(frozen=True)
class Limits:
    """What a mix must hold; at least one is given.

    Attributes:
        drop: Most points of mAP below the float model.
        sqnr: Least SQNR of the judged maps, dB.
        latency: Most seconds, in those of the all-INT8 model.
    """

    drop: float | None = None
    sqnr: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        if self.drop is None and self.sqnr is None and self.latency is None:
            raise ValueError('give a limit: of the drop, the SQNR or the latency')
        if self.drop is not None and self.drop < 0:
            raise ValueError(f'the drop must be at least 0 points, got {self.drop}')
        if self.latency is not None and self.latency < 1:
            raise ValueError(
                f'the latency is in times of the all-INT8 model, 1 or more, got {self.latency}'
            )

    @property
    def needs_boxes(self) -> bool:
        """Whether boxes are to be scored."""
        return self.drop is not None

    def problem(self, drop: float | None, noise: float) -> str:
        """Says which limit of accuracy a mix breaks; empty if none."""
        if self.drop is not None and drop is not None and drop > self.drop:
            return f'it loses {drop:.2f} points, more than {self.drop:g}'
        if self.sqnr is not None and decibels(1, noise) < self.sqnr:
            return f'its SQNR is {decibels(1, noise):.1f} dB, less than {self.sqnr:g}'
        return ''


@dataclass(frozen=True)
class Mixed:
    """A written config.

    Attributes:
        path: The config; None if all INT8 holds the limits, so that none is needed.
        units: Names of the units that are float.
        skip: Reason by pattern, as in the config.
        total: Its cost.
        before: The cost of all INT8.
        seen: ``drop`` in points (None without boxes) and ``noise`` of float units in the frames
            that were searched on.
        unseen: The same of the config, built anew, on frames that the search did not see; and
            ``drop_int8`` and ``noise_int8`` of all INT8 there.
        problem: Which limit it breaks there, or could not hold; empty if none.
    """

    path: Path | None
    units: tuple[str, ...]
    skip: dict[str, str]
    total: Total
    before: Total
    seen: dict[str, Any]
    unseen: dict[str, Any]
    problem: str = ''

    def plain(self) -> dict[str, Any]:
        """Returns all as plain values that JSON takes."""
        values = dict(vars(self), units=list(self.units), path=str(self.path or ''))
        return dict(values, total=plain(self.total), before=plain(self.before))


def mix(
    tasks: Tasks,
    units: Sequence[Unit],
    steps: Sequence[Step],
    costs: Costs,
    limits: Limits,
    goal: tuple[Config, Recipe, Path],
    frames: Sequence[int],
    unseen: Sequence[int],
    shares: Mapping[str, float],
) -> Mixed:
    """Finds how many steps hold the limits, writes the config, and checks it.

    Args:
        tasks: Runs the measurements.
        units: All units.
        steps: In which order they become float.
        costs: Of the model.
        limits: What to hold.
        goal: The parent config, how it is built, and where to write its child.
        frames: Frames to search on.
        unseen: Frames to check on.
        shares: Of the noise of all units, by name.

    Returns:
        :class:`Mixed`.

    Raises:
        QuantError: If the config that was written does not build what was searched.
    """
    cfg, recipe, path = goal
    most = len(steps)
    if limits.latency is not None:
        allowed = limits.latency * costs.total().seconds
        most = max([i for i, s in enumerate(steps, 1) if s.total.seconds <= allowed], default=0)

    def at(count: int) -> dict[str, Any]:
        chosen = [name for step in steps[:count] for name in step.unit.members]
        return accuracy(tasks, chosen, frames, limits)

    count: int | None = most
    if limits.drop is not None or limits.sqnr is not None:
        count = shortest(most, lambda k: not limits.problem(**at(k)))
    problem = ''
    if count is None:
        count = most
        found = limits.problem(**at(most))
        problem = f'with all {most} units float that the order and the latency allow {found}'
    chosen = [step.unit for step in steps[:count]]
    seen = at(count)
    if not count:
        check = accuracy(tasks, (), unseen, limits)
        problem = problem or limits.problem(**check)
        return Mixed(None, (), {}, costs.total(), costs.total(), seen, check, problem)
    skip = patterns(tasks.bench, chosen, shares)
    text = [
        f'Child of {Path(recipe.config).name}: {len(chosen)} of {len(units)} units stay float.',
        f'Checkpoint: {recipe.checkpoint}, whose other ranges are used as they are.',
    ]
    write_skip_config(cfg, recipe.config, path, skip, text)
    child = replace(recipe, config=str(path))
    check = check_child(child, tasks, chosen, unseen, limits)
    total = costs.total([name for unit in chosen for name in unit.members])
    before = costs.total()
    names = tuple(unit.name for unit in chosen)
    problem = problem or limits.problem(check['drop'], check['noise'])
    return Mixed(path, names, skip, total, before, seen, check, problem)


def accuracy(
    tasks: Tasks, floats: Collection[str], frames: Sequence[int], limits: Limits
) -> dict[str, Any]:
    """Measures ``drop`` in points against float (None if not asked for) and ``noise`` of a mix."""
    settings = dict(frames=list(frames))
    if not limits.needs_boxes:
        only = [name for name in tasks.bench.members if name not in set(floats)]
        todo: list[Task] = [dict(kind='noise', only=only, **settings)]
        return dict(drop=None, noise=tasks.run('Measuring a mix', todo)[0])
    todo = [
        dict(kind='state', floats=list(tasks.bench.members), **settings),
        dict(kind='state', floats=list(floats), **settings),
    ]
    exact, state = tasks.run('Scoring a mix', todo)
    return dict(drop=exact['map'] - state['map'], noise=state['noise'])


def patterns(bench: Bench, units: Sequence[Unit], share: Mapping[str, float]) -> dict[str, str]:
    """Writes units as ``skip``: the highest modules that have nothing else inside."""
    known = list(quantizers(bench.model))
    skip: dict[str, str] = {}
    for unit in units:
        reason = REASON.format(share=share[unit.name])
        names = float_quantizers([unit], bench.members)
        skip.update(dict.fromkeys(covering(names, known), reason))
    return skip


def check_child(
    child: Recipe, tasks: Tasks, units: Sequence[Unit], frames: Sequence[int], limits: Limits
) -> dict[str, Any]:
    """Builds a config anew with the ranges of the checkpoint, and measures it.

    Returns:
        ``drop``, ``noise`` of it; ``drop_int8``, ``noise_int8`` of the config before.

    Raises:
        QuantError: If other quantizers are float than were meant to be.
    """
    bench, _ = child.make()
    meant = {*kept_float(tasks.bench.model), *float_quantizers(units, tasks.bench.members)}
    there = set(kept_float(bench.model))
    if there != meant:
        odd = sorted(there ^ meant)
        raise QuantError(
            f'{child.config} keeps other quantizers float than were searched, such as {odd[0]}: '
            'is its skip changed by --cfg-options?'
        )
    before = accuracy(tasks, (), frames, limits)
    members, drop = list(bench.members), None
    if limits.needs_boxes:
        state = bench.state(members, frames)
        drop, noise = bench.state((), frames)['map'] - state['map'], state['noise']
    else:
        noise = bench.noise(members, frames)
    return dict(drop=drop, noise=noise, drop_int8=before['drop'], noise_int8=before['noise'])
