"""Finds which layers of a calibrated detector cost accuracy, from files to files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.ties import ties
from mmdet3d_quant.files.outputs import check_writable, sha256
from mmdet3d_quant.jobs.bench_tasks import Recipe, Task, Tasks
from mmdet3d_quant.jobs.ledger import Ledger
from mmdet3d_quant.jobs.mixed import Limits, Mixed, mix
from mmdet3d_quant.report.sensitivity import write_sensitivity
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.listener import Listener
from mmdet3d_quant.runs.provenance import provenance
from mmdet3d_quant.sensitivity.cost import RATES, Costs, Rates, describe, plain
from mmdet3d_quant.sensitivity.measure import TRUTHS
from mmdet3d_quant.sensitivity.rows import Row, predicted_noise, row_facts
from mmdet3d_quant.sensitivity.search import REST, order
from mmdet3d_quant.sensitivity.units import LEVELS, Unit, find_units


@dataclass(frozen=True)
class Effort:
    """How much is computed.

    Attributes:
        frames: Frames on which noise is predicted.
        probes: Backward passes on each.
        alone: Frames on which the noise of a unit alone is measured, where it was predicted to
            matter; 0 for none.
        measure: Units, those with the most noise, that are made float to see what that gains.
        boxes: Frames on which boxes are scored.
        check: Frames, none of those before, on which a written config is checked.
    """

    frames: int = 16
    probes: int = 4
    alone: int = 2
    measure: int = 0
    boxes: int = 16
    check: int = 16

    def __post_init__(self) -> None:
        for name, least in dict(frames=1, probes=1, alone=0, measure=0, boxes=1, check=1).items():
            if getattr(self, name) < least:
                raise ValueError(f'{name} must be at least {least}, got {getattr(self, name)}')


@dataclass(frozen=True)
class Sensitivity:
    """Result of :func:`analyse_sensitivity`.

    Attributes:
        rows: One per unit, the noisiest first.
        facts: All numbers, as in the JSON.
        page: The report.
        mixed: The config that was written, and how it did; None without limits.
    """

    rows: list[Row]
    facts: dict[str, Any]
    page: Path
    mixed: Mixed | None


@torch.inference_mode(False)
def analyse_sensitivity(
    config: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    level: str = 'layer',
    effort: Effort | None = None,
    limits: Limits | None = None,
    truth: str = 'float',
    rates: str = 'gpu',
    measured: Mapping[str, tuple[float, float]] | None = None,
    processes: int = 1,
    resume: bool = False,
    force: bool = False,
    device: str | None = None,
    overrides: dict[str, Any] | None = None,
    command: str | None = None,
    listener: Listener | None = None,
) -> Sensitivity:
    """Finds which units of a calibrated detector cost accuracy, and what to do about it.

    Args:
        config: A config with quantized types.
        checkpoint: Its calibrated checkpoint.
        out: Stem of what is written: ``.html``, ``.json`` and, with limits, ``.py``.
        level: One of ``units.LEVELS``.
        effort: How much is computed.
        limits: What the written config must hold; without, none is written.
        truth: Whose boxes are the truth: ``'float'``, the float model's, or ``'labels'``.
        rates: Name of the nominal engine that seconds are estimated for.
        measured: Seconds in INT8 and in float by layer, from an engine.
        processes: Processes that work, each with a model of its own.
        resume: Go on from the results that an interrupted run left.
        force: Replace a config that is there.
        device: ``'cpu'`` or ``'cuda:N'``; by default a GPU where there is one.
        overrides: Entries of the config, by dotted key.
        command: Command line to show in the report.
        listener: Receives the progress.

    Returns:
        :class:`Sensitivity`.

    Raises:
        ConfigError: If the config, its data, or the number of frames is wrong.
        CheckpointError: If the checkpoint does not fit the model.
        UncalibratedError: If it has no ranges.
        ResumeError: If an unfinished run is there and ``resume`` is off, or it is of another run.
        ValueError: If an argument makes no sense.
        OSError: If a file cannot be written.
    """
    effort, listener = effort or Effort(), listener or Listener()
    _check_choices(level, truth, rates, processes)
    page = Path(f'{out}.html')
    child = Path(f'{out}.py') if limits is not None else None
    for path in (page, page.with_suffix('.json'), *([child] if child else [])):
        check_writable(path)
    if child and child.exists() and not force:
        raise FileExistsError(f'{child} is there: give another --out, or --force')
    recipe = Recipe(str(config), str(checkpoint), truth, device, overrides)
    bench, frames = recipe.make()
    units = find_units(bench.model, level)
    used, unseen = _split(frames, effort, limits is not None, str(config))
    cfg = fc.read_config(config, overrides)
    key = dict(config=cfg.pretty_text, checkpoint=sha256(checkpoint), truth=truth)
    ledger = Ledger(f'{out}.partial', key, resume)
    if len(ledger):
        listener.note(f'Going on after {len(ledger)} results')
    data = fc.calibration_entry(cfg)
    same = fc.evaluated_on(cfg, data)
    if same and limits is not None:
        listener.warn(
            f'{data} has the data that {" and ".join(same)} evaluate(s) on: scores of the '
            'written config will flatter. Set calib_dataloader to training data'
        )
    tasks = Tasks(bench, recipe, ledger, listener, processes)
    try:
        rows, costs = _score(tasks, units, used, effort, RATES[rates], measured or {})
        base = _measure(tasks, rows, used[: effort.boxes], effort.measure)
        steps = order(units, {row.unit.name: row.noise for row in rows}, costs)
        mixed = None
        if limits is not None and child is not None:
            goal = (cfg, recipe, child)
            seen = used[: effort.boxes]
            whole = sum(row.noise for row in rows) or 1.0
            shares = {row.unit.name: row.noise / whole for row in rows}
            mixed = mix(tasks, units, steps, costs, limits, goal, seen, unseen, shares)
    finally:
        tasks.close()
    facts: dict[str, Any] = dict(unit=level, truth=truth, effort=vars(effort))
    facts.update(row_facts(rows, steps, costs, base))
    facts['mixed'] = None if mixed is None else mixed.plain()
    about = {k: v for k, v in provenance(cfg, checkpoint).items() if k != 'cfg'}
    facts['about'] = {**about, **({'command': command} if command else {})}
    write_sensitivity(page, facts)
    ledger.clear()
    return Sensitivity(rows, facts, page, mixed)


def _check_choices(level: str, truth: str, rates: str, processes: int) -> None:
    known = dict(unit=(level, LEVELS), truth=(truth, TRUTHS), rates=(rates, tuple(RATES)))
    for what, (value, choices) in known.items():
        if value not in choices:
            raise ValueError(f'unknown {what} {value!r}: expected one of {", ".join(choices)}')
    if processes < 1:
        raise ValueError(f'processes must be at least 1, got {processes}')


def _split(
    frames: Sequence[int], effort: Effort, checked: bool, config: str
) -> tuple[list[int], list[int]]:
    """Frames to search on, and others to check on: the last ones."""
    wanted = max(effort.frames, effort.alone, effort.boxes)
    needed = wanted + (effort.check if checked else 0)
    if needed > len(frames):
        raise fc.ConfigError(
            f'{config}: {needed} frames are needed, {wanted} to search on'
            + (f' and {effort.check} others to check on' if checked else '')
            + f', but its data set has {len(frames)}: ask for fewer'
        )
    return list(frames[:wanted]), list(frames[len(frames) - effort.check :]) if checked else []


def _score(
    tasks: Tasks,
    units: Sequence[Unit],
    frames: Sequence[int],
    effort: Effort,
    rates: Rates,
    measured: Mapping[str, tuple[float, float]],
) -> tuple[list[Row], Costs]:
    """Predicts the noise of all units, measures that of those that matter, and counts costs."""
    few = frames[: effort.frames]
    sizes = tasks.run('Layers', [dict(kind='sizes', frame=few[0])])[0]
    predict: list[Task] = [dict(kind='predict', frame=f, probes=effort.probes) for f in few]
    found = tasks.run('Predicting, by frame', predict)
    rows = [Row(unit, predicted_noise(unit, [f['products'] for f in found])) for unit in units]
    least = REST * sum(row.noise for row in rows)
    if effort.alone:
        worth = [row for row in rows if row.noise >= least]
        alone: list[Task] = [
            dict(kind='noise', only=list(r.unit.members), frames=list(frames[: effort.alone]))
            for r in worth
        ]
        for row, noise in strict_zip(worth, tasks.run('Measuring noise, by unit', alone)):
            row.alone = noise
    rows.sort(key=lambda row: -row.noise)
    layers = describe(sizes, found[0]['sources'], ties(tasks.bench.model))
    costs = Costs(layers, tasks.bench.members, rates, measured)
    before = plain(costs.total())
    for row in rows:
        after = plain(costs.total(row.unit.members))
        row.cost = {k: after[k] - before[k] for k in before}
        row.own_int8, row.own_float = (plain(total) for total in costs.of(row.unit))
    return rows, costs


def _measure(
    tasks: Tasks, rows: Sequence[Row], frames: Sequence[int], count: int
) -> dict[str, Any] | None:
    """Scores the boxes with each of the noisiest units float; returns the mix of all INT8."""
    if not count:
        return None
    mixes: list[list[str]] = [[], *(list(row.unit.members) for row in rows[:count])]
    todo: list[Task] = [dict(kind='state', floats=m, frames=list(frames)) for m in mixes]
    exact: Task = dict(kind='state', floats=list(tasks.bench.members), frames=list(frames))
    float_, base, *found = tasks.run('Scoring boxes, by unit', [exact, *todo])
    for row, state in strict_zip(rows[:count], found):
        row.map, row.gain = state['map'], state['map'] - base['map']
        row.spread = float(np.std(np.subtract(state['draws'], base['draws'])))
    return dict(float=float_['map'], int8=base['map'], noise=base['noise'])
