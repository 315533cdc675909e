"""Calibrates a checkpoint from files to files: resumable, in one or several processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_dist_info, is_distributed

from mmdet3d_quant.calibration import (
    Calibration,
    CalibrationError,
    Calibrator,
    Progress,
    ResumeError,
    Stability,
    Strata,
)
from mmdet3d_quant.calibration.stability import TOLERANCE
from mmdet3d_quant.core.coverage import coverage, float_parts
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.core.unsigned import unsigned_ranges
from mmdet3d_quant.files.outputs import check_writable, sha256, whole
from mmdet3d_quant.jobs.distance import sensor_of as sensor_of
from mmdet3d_quant.jobs.distance import strata_of
from mmdet3d_quant.jobs.outliers import outliers
from mmdet3d_quant.jobs.plan import read_plan
from mmdet3d_quant.jobs.run_steps import Steps
from mmdet3d_quant.jobs.share import Batches, Share, hold_out
from mmdet3d_quant.jobs.steps import BEFORE, Given, Setup, read_steps
from mmdet3d_quant.jobs.told import Told
from mmdet3d_quant.report.calibration import write_ranges
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs import processes
from mmdet3d_quant.runs.listener import Listener
from mmdet3d_quant.runs.provenance import provenance

#: Batches that steps before the ranges look at.
EQUALIZED_ON = 8


@dataclass(frozen=True)
class Calibrated:
    """Result of :func:`calibrate_checkpoint`.

    Attributes:
        calibration: The ranges, and the statistics that they were chosen from.
        strata: Fit of the inputs of sparse layers by distance; empty without such layers.
        page: The report.
    """

    calibration: Calibration
    strata: list[Strata]
    page: Path


@torch.inference_mode(False)
def calibrate_checkpoint(
    config: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    methods: Sequence[str] = (),
    weights: str | None = None,
    num_batches: int | None = None,
    until_stable: float | None = None,
    resume: bool = False,
    strict: bool = False,
    equalize: bool = False,
    empty_cells: bool = False,
    bias_correction: Sequence[str] = (),
    steps: Given | None = None,
    recipe: str | None = None,
    launcher: str = 'none',
    device: str | None = None,
    overrides: dict[str, Any] | None = None,
    command: str | None = None,
    listener: Listener | None = None,
) -> Calibrated:
    """Calibrates the model of a config on its data; writes a checkpoint and a report.

    With a launcher every process calls this; the first one writes, and all return the same
    ``calibration``.

    Args:
        config: A config with Quant* types.
        checkpoint: Its float weights.
        out: Checkpoint to write; the report has the same name with ``.html``.
        methods: ``'mse'`` or ``'pattern=mse'``, see :meth:`Plan.parse`; they follow those of the
            config's ``calibration``.
        weights: ``'max'`` or ``'mse'``; by default the config's, or ``'max'``.
        num_batches: Batches to use; all by default.
        until_stable: Stop when the ranges moved less than this share; by default all batches
            are used.
        resume: Go on from the statistics that an interrupted run left beside ``out``.
        strict: A warning is an error: nothing is written.
        equalize: Scale the inputs of each concat to one size first, see
            :func:`mmdet3d_quant.improve.equalize_concats`.
        empty_cells: Put the value of empty cells on a step, see
            :class:`mmdet3d_quant.improve.EmptyCells`; found on a batch held out.
        bias_correction: Name patterns of layers whose mean output error is taken off their bias,
            see :class:`mmdet3d_quant.improve.BiasCorrection`; measured on batches held out.
        steps: Steps beside the ranges, by name: True for all layers, or name patterns, as
            ``dict(equalize_layers=['pts_backbone'])``; see :data:`mmdet3d_quant.jobs.steps.STEPS`.
            They add to those of the config's ``calibration``, and so do the three above.
        recipe: Set of steps, of :data:`mmdet3d_quant.jobs.steps.RECIPES`, instead of the
            config's.
        launcher: Launcher that started the processes, one of ``processes.LAUNCHERS``; they are
            joined here.
        device: ``'cpu'`` or ``'cuda:N'``; by default a GPU where there is one.
        overrides: Entries of the config, by dotted key.
        command: Command line to show in the report.
        listener: Receives the progress, in the first process.

    Returns:
        :class:`Calibrated`, the ranges and the page.

    Raises:
        ConfigError: If the config, its data or the launcher is wrong.
        CheckpointError: If the checkpoint does not fit the model.
        ResumeError: If an unfinished run is there and ``resume`` is off, or it is of another run.
        CalibrationError: If there is no range for a quantizer, or a warning and ``strict``.
        ValueError: If an argument makes no sense, or the processes have joined before.
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f'num_batches must be at least 1, got {num_batches}')
    if is_distributed():
        raise ValueError('the processes have joined already; calibrate_checkpoint does that itself')
    page = Path(out).with_suffix('.html')
    for path in (out, page):
        check_writable(path)
    cfg = fc.read_config(config, overrides)
    plan = read_plan(cfg, methods, weights)
    model = fc.build_model(cfg)
    meta = fc.load_weights(model, checkpoint, calibrated=False)
    # Before processes join, or samplers would split the batches, which the job shares out.
    name, loader = fc.build_calibration_loader(cfg)
    batches = dict(enumerate(fc.batch_indices(loader)[:num_batches]))
    processes.join(launcher)
    rank, world = get_dist_info()
    place = fc.pick_device(processes.own_device(device))
    calibrator = Calibrator(model.to(place), plan, tolerance=until_stable or TOLERANCE)
    own: dict[str, Any] = dict(
        equalize_concats=equalize, empty_cells=empty_cells, bias_correction=bias_correction
    )
    chosen = read_steps(cfg, model, recipe, steps or {}, own)
    held = calibrator.needs_held_out or not set(chosen) <= set(BEFORE)
    seen, held_out = hold_out(batches) if held else (batches, {})
    data = Share(name, loader, seen, held_out, rank, world)
    told = Told(Listener() if rank > 0 or listener is None else listener, strict)
    made = Steps(chosen, Setup(plan.weights, lambda: data.load(seen), told.listener))
    made.check(model)
    key = dict(checkpoint=sha256(checkpoint), config=cfg.pretty_text)
    key.update(data=name, batches=list(seen.values()), before=made.before)
    saved = Progress(out, key, rank)
    _introduce(calibrator, data, cfg, place, told)
    if chosen:
        told.listener.note(str(made))
    first = dict(list(data.seen.items())[:EQUALIZED_ON])
    equalized = made.move(model, lambda: _loaded(data, first), told)
    done = _go_on(calibrator, saved, resume, rank)
    _observe(calibrator, data, done, saved, bool(until_stable), told.listener)
    try:
        result = calibrator.finish(data.load(held_out), list(made.after.values()))
    except CalibrationError:
        if rank == 0:
            saved.clear()  # the same batches would end the same way
        raise
    if rank > 0:
        return Calibrated(result, [], page)
    about = provenance(cfg, checkpoint)
    strata = strata_of(model, data, cfg)
    shown = {k: v for k, v in about.items() if k != 'cfg'}
    shown.update({'command': command} if command else {}, loader=name, warnings=told.warnings)
    shown.update(dict(steps=made.lines()) if chosen else {})
    write_ranges(page, result, shown, strata, equalized)
    odd = [r.name for r in result.ranges if r.health.flags]
    if odd:
        told.warn(f'{len(odd)} quantizers are odd, see {page}: {", ".join(odd[:3])}, ...')
    narrow = [r.name for r in result.ranges if 'narrow' in r.health.flags]
    if narrow and equalized is None:
        told.warn(
            f'{len(narrow)} quantizers have an input with few bits left: {", ".join(narrow[:3])}, '
            '...; where it is that of a concat, --equalize-concats scales its inputs to one size'
        )
    for warning in outliers(result, data.seen):
        told.warn(warning)
    calibration = dict(method=result.method, num_batches=result.num_batches, loader=name)
    meta.update(about, calibration=calibration, kept_float=result.kept_float)
    meta.update(unsigned_ranges=unsigned_ranges(model))
    meta.update(macs={k.name: k.macs for k in result.coverage.layers if k.macs is not None})
    for step in made.after.values():
        told.listener.note(str(step))
    made.record(meta)
    with whole(out) as path:
        torch.save(dict(state_dict=model.cpu().state_dict(), meta=meta), path)
    saved.clear()
    return Calibrated(result, strata, page)


def _introduce(
    calibrator: Calibrator, data: Share, cfg: Config, place: torch.device, told: Told
) -> None:
    """Reports the settings of the run, and warns of unusual ones."""
    active = sum(q.float_reason is None for q in quantizers(calibrator.model).values())
    told.listener.note(
        f'{active} quantizers in {len(calibrator.groups)} groups and alone; '
        f'method {calibrator.plan}; up to {len(data.seen)} of the batches of {data.name}'
        + (f', {len(data.held_out)} more held out' if data.held_out else '')
        + f'; {place}'
        + (f', {data.world} processes' if data.world > 1 else '')
    )
    same = fc.evaluated_on(cfg, data.name)
    if same:
        told.warn(
            f'{data.name} has the data that {" and ".join(same)} evaluate(s) on: '
            'scores will flatter. Set calib_dataloader to training data'
        )
    for warning in float_parts(calibrator.model, coverage(calibrator.model)):
        told.warn(warning)


def _loaded(data: Share, batches: Batches) -> Iterator[Any]:
    """Loads batches, the same in all processes."""
    return (batch for _, batch in fc.numbered_batches(data.loader, batches))


def _go_on(calibrator: Calibrator, saved: Progress, resume: bool, rank: int) -> list[int]:
    """Restores an interrupted run; returns the numbers of its batches, in all processes."""
    statistics, stability = calibrator.statistics, calibrator.stability
    state: list[Any] = [None]
    if rank == 0:
        try:
            saved.load(statistics, stability, resume)
            state = [(sorted(statistics.batches), stability.state_dict())]
        except ResumeError as err:
            state = [err]
    broadcast_object_list(state)
    if isinstance(state[0], ResumeError):
        raise state[0]
    done, looks = state[0]
    stability.load_state_dict(looks)
    return done


def _observe(
    calibrator: Calibrator,
    data: Share,
    done: list[int],
    saved: Progress,
    until_stable: bool,
    listener: Listener,
) -> None:
    """Runs this process's share of the batches that are not done."""
    statistics, stability = calibrator.statistics, calibrator.stability
    if done:
        listener.note(f'Going on after {len(done)} batches')
    todo = {n: indices for n, indices in data.seen.items() if n not in done}
    steps = calibrator.observe(data.load(todo))
    with listener.counting('Observing', len(data.seen), len(done)) as count:
        try:
            for turn in range(math.ceil(len(todo) / data.world)):
                if until_stable and stability.settled_at is not None:
                    break
                next(steps, None)
                now = min(len(done) + (turn + 1) * data.world, len(data.seen))
                if Stability.due(math.ceil(now / data.world)):
                    calibrator.look()
                saved.save(statistics, stability)
                count(now)
        except BaseException:
            if statistics.batches:
                saved.save(statistics, stability, now=True)
            raise
