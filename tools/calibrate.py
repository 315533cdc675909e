#!/usr/bin/env python
"""Calibrate a quantized model: find the INT8 range of every layer from a few batches of data."""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import processes
import torch
from mmengine.config import Config, DictAction
from mmengine.dist import broadcast_object_list, get_dist_info
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from terminal import open_console, run_tool

import mmdet3d_quant as mq
from mmdet3d_quant.calibration import (
    Calibration,
    Calibrator,
    Plan,
    ResumeError,
    Stability,
    Strata,
    by_distance,
)
from mmdet3d_quant.calibration import Progress as Saved
from mmdet3d_quant.calibration.stability import TOLERANCE
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.files.outputs import check_writable, sha256, whole
from mmdet3d_quant.report.ranges import write_ranges
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.provenance import provenance

#: Of the batches, one in so many is held out for the method auto.
HELD_OUT = 8
#: Rows of the table on the console; the report has all.
WORST = 12
EXAMPLE = """
examples:
  CONFIG=configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn_int8_nus-3d.py

  # 128 batches of the config's calib_dataloader (or val_dataloader), method mse
  python tools/calibrate.py $CONFIG float.pth --out int8.pth --num-batches 128

  # another method for a part of the model; the best for each layer's output
  python tools/calibrate.py $CONFIG float.pth --out int8.pth \\
      --method mse --method 'pts_backbone=percentile:99.99'
  python tools/calibrate.py $CONFIG float.pth --out int8.pth --method auto

  # stop when more batches do not move the ranges; go on after an interruption
  python tools/calibrate.py $CONFIG float.pth --out int8.pth --until-stable
  python tools/calibrate.py $CONFIG float.pth --out int8.pth --resume

  # four processes, same ranges
  torchrun --nproc-per-node 4 tools/calibrate.py $CONFIG float.pth --out int8.pth \\
      --launcher pytorch

  # keep the first convolution float
  python tools/calibrate.py $CONFIG float.pth --out int8.pth \\
      --cfg-options model.img_backbone.skip="['conv1']"

The config may hold the methods: calibration=dict(method='mse', overrides={'pts_neck': 'max'},
weights='max'). The output is an ordinary checkpoint: mmdet3d's init_model and tools/test.py load
it. Beside it lies a report, OUT with .html instead of .pth.
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', help='config with Quant* types')
    add('checkpoint', help='float checkpoint')
    add('--out', required=True, help='checkpoint to write')
    add('--num-batches', type=int, help='batches to use; default: all')
    add('--method', action='append', default=[], metavar='[PATTERN=]METHOD',
        help='max, percentile[:99.99], entropy, mse or auto; may be repeated, with a pattern of '
        "module names for a part of the model; default: the config's, or mse")  # fmt: skip
    add('--weights', choices=['max', 'mse'], help="default: the config's, or max")
    add('--until-stable', nargs='?', type=float, const=TOLERANCE, metavar='TOLERANCE',
        help='stop when 95%% of the ranges moved less than this share while the batches doubled, '
        'twice in a row; default: %(const)s')  # fmt: skip
    add('--resume', action='store_true', help='go on where an interrupted run stopped')
    add('--strict', action='store_true', help='a warning is an error: nothing is written')
    add('--launcher', choices=processes.LAUNCHERS, default='none', help='job launcher')
    add('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    add('--device', help='cpu or cuda[:N]; default: a GPU where there is one')
    add('--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE overrides of the config')
    return parser.parse_args(argv)


class Run:
    """One calibration from files to files.

    Args:
        args: From the command line.
        console: Where to tell; quiet in all processes but the first.
    """

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self.console = args, console
        self.warnings: list[str] = []
        self.strata: list[Strata] = []
        self.html = Path(args.out).with_suffix('.html')
        for path in (args.out, self.html):
            check_writable(path)
        self.cfg = fc.read_config(args.config, args.cfg_options)
        self.plan = read_plan(self.cfg, args)
        model = fc.build_model(self.cfg)
        self.meta = fc.load_weights(model, args.checkpoint, calibrated=False)
        # Before processes join, or samplers would split the batches, which are shared out below.
        self.loader_name, self.loader = fc.build_calibration_loader(self.cfg)
        batches = dict(enumerate(fc.batch_indices(self.loader)[: args.num_batches]))
        processes.join(args.launcher)
        self.rank, self.world = get_dist_info()
        console.quiet = self.rank > 0
        self.device = fc.pick_device(processes.own_device(args.device))
        tolerance = args.until_stable or TOLERANCE
        self.calibrator = Calibrator(model.to(self.device), self.plan, tolerance=tolerance)
        held_out = max(1, len(batches) // HELD_OUT) if self.calibrator.needs_held_out else 0
        if held_out == len(batches):
            raise ValueError('the method auto needs at least 2 batches: it holds some out')
        numbers = list(batches)
        self.seen = {n: batches[n] for n in numbers[: len(numbers) - held_out]}
        self.held_out = {n: batches[n] for n in numbers[len(numbers) - held_out :]}
        key = dict(checkpoint=sha256(args.checkpoint), config=self.cfg.pretty_text)
        key.update(data=self.loader_name, batches=list(self.seen.values()))
        self.saved = Saved(args.out, key, self.rank)

    def preflight(self) -> None:
        """Tells what will be done, and what is odd about it."""
        model = self.calibrator.model
        active = sum(q.float_reason is None for q in mq.quantizers(model).values())
        self.console.print(
            f'{active} quantizers in {len(self.calibrator.groups)} groups and alone; '
            f'method {self.plan}; up to {len(self.seen)} of the batches of {self.loader_name}'
            + (f', {len(self.held_out)} more held out' if self.held_out else '')
            + f'; {self.device}'
            + (f', {self.world} processes' if self.world > 1 else '')
        )
        same = fc.evaluated_on(self.cfg, self.loader_name)
        if same:
            self.warn(
                f'{self.loader_name} has the data that {" and ".join(same)} evaluate(s) on: '
                'scores will flatter. Set calib_dataloader to training data'
            )

    def warn(self, text: str) -> None:
        """Notes a warning and tells it.

        Raises:
            CalibrationError: With ``--strict``.
        """
        if self.args.strict:
            raise mq.CalibrationError(f'{text} (--strict)')
        self.warnings.append(text)
        self.console.print(f'[yellow]warning:[/yellow] {text}')

    def observe(self) -> None:
        """Runs this process's share of the batches."""
        calibrator, saved = self.calibrator, self.saved
        statistics, stability = calibrator.statistics, calibrator.stability
        state: list[Any] = [None]
        if self.rank == 0:
            try:
                saved.load(statistics, stability, self.args.resume)
                state = [(sorted(statistics.batches), stability.state_dict())]
            except ResumeError as err:
                state = [err]
        broadcast_object_list(state)
        if isinstance(state[0], ResumeError):
            raise state[0]
        done, looks = state[0]
        stability.load_state_dict(looks)
        if done:
            self.console.print(f'Going on after {len(done)} batches')
        todo = [n for n in self.seen if n not in done]
        mine = {n: self.seen[n] for n in todo[self.rank :: self.world]}
        steps = calibrator.observe(fc.numbered_batches(self.loader, mine))
        columns = TextColumn('Observing'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task('', total=len(self.seen), completed=len(done))
            try:
                for turn in range(math.ceil(len(todo) / self.world)):
                    if self.args.until_stable and stability.settled_at is not None:
                        break
                    next(steps, None)
                    count = min(len(done) + (turn + 1) * self.world, len(self.seen))
                    if Stability.due(math.ceil(count / self.world)):
                        calibrator.look()
                    saved.save(statistics, stability)
                    bar.update(task, completed=count)
            except BaseException:
                if statistics.batches:
                    saved.save(statistics, stability, now=True)
                raise

    def finish(self) -> Calibration:
        """Chooses the ranges; writes report and checkpoint."""
        numbers = list(self.held_out)[self.rank :: self.world]
        held_out = {n: self.held_out[n] for n in numbers}
        try:
            result = self.calibrator.finish(fc.numbered_batches(self.loader, held_out))
        except mq.CalibrationError:
            if self.rank == 0:
                self.saved.clear()  # the same batches would end the same way
            raise
        if self.rank > 0:
            return result
        about = provenance(self.cfg, self.args.checkpoint)
        odd = [r.name for r in result.ranges if r.health.flags]
        shown = dict(about, command=self.args.command, loader=self.loader_name)
        shown.pop('cfg', None)
        self.strata = self.by_distance()
        write_ranges(self.html, result, dict(shown, warnings=self.warnings), self.strata)
        if odd:
            self.warn(f'{len(odd)} quantizers are odd, see {self.html}: {", ".join(odd[:3])}, ...')
        self.meta.update(about)
        self.meta['calibration'] = dict(
            method=result.method, num_batches=result.num_batches, loader=self.loader_name
        )
        state = self.calibrator.model.cpu().state_dict()
        with whole(self.args.out) as path:
            torch.save(dict(state_dict=state, meta=self.meta), path)
        self.saved.clear()
        return result

    def by_distance(self) -> list[Strata]:
        """How the inputs of sparse layers fit near the sensor and far from it, on one batch."""
        model = self.calibrator.model
        if not any(hasattr(m, 'height_axis') for m in model.modules()):
            return []
        number, indices = next(iter(self.seen.items()))
        _, batch = next(fc.numbered_batches(self.loader, {number: indices}))
        return by_distance(model, batch, sensor=sensor_of(self.cfg))


def sensor_of(cfg: Config) -> tuple[float, float]:
    """Where the sensor is in the voxel grid, as a share of it along x and y."""
    own = cfg.model.get('data_preprocessor') or {}
    layers = (own.get(key) or {} for key in ('voxelize_cfg', 'voxel_layer'))
    found = [layer['point_cloud_range'] for layer in layers if 'point_cloud_range' in layer]
    if not found:
        return 0.5, 0.5
    low, high = found[0][:2], found[0][3:5]
    x, y = (-a / (b - a) for a, b in strict_zip(low, high))
    return x, y


def read_plan(cfg: Config, args: argparse.Namespace) -> Plan:
    """The plan of the config, then what the command line says.

    Raises:
        ConfigError: If the config's ``calibration`` has an unknown entry.
        ValueError: If a method is unknown.
    """
    own = dict(cfg.get('calibration') or {})
    texts = [own.pop('method', 'mse')]
    texts += [f'{pattern}={method}' for pattern, method in own.pop('overrides', {}).items()]
    weights = own.pop('weights', 'max')
    if own:
        raise fc.ConfigError(
            f'{cfg.filename}: `calibration` has unknown entries {", ".join(own)}; it takes method, '
            'overrides and weights'
        )
    return Plan.parse([*texts, *args.method], args.weights or weights)


def tell(result: Calibration, strata: list[Strata], console: Console, out: str, html: Path) -> None:
    """Prints the gist: the worst layers, whether it was enough data, what stays float."""
    worst = sorted(result.ranges, key=lambda r: r.health.sqnr)
    title = 'worst first; all in the report' if len(worst) > WORST else 'worst first'
    table = Table('activation quantizer', 'amax', 'largest', 'method', 'SQNR, dB', 'clipped', 'odd',
                  title=title)  # fmt: skip
    for r in worst[:WORST]:
        numbers = (f'{r.amax:.4g}', f'{r.largest:.4g}', r.method)
        health = (f'{r.health.sqnr:.1f}', f'{r.health.clipped:.3%}', ' '.join(r.health.flags))
        table.add_row(r.name, *numbers, *health)
    console.print(table)
    if strata:
        middle = len(strata) // 2
        values = (sorted(s.bands[i].sqnr for s in strata)[middle] for i in range(3))
        texts = (f'{value:.1f}' for value in values)
        console.print(f'Sparse layers near, middle, far: SQNR {", ".join(texts)} dB (median)')
    for name, reason in result.kept_float.items():
        console.print(f'float: {name} ({reason})')
    last = result.looks[-1]
    if result.settled_at is not None:
        console.print(f'The ranges have settled after {result.settled_at} batch(es)')
    elif last.moved is not None:
        console.print(
            f'The ranges still moved from {result.looks[-2].num_batches} to {last.num_batches} '
            f'batches (95 % of them by up to {last.high:.1%}): more batches may help'
        )
    console.print(
        f'{len(result.ranges)} activation and {result.num_weights} weight quantizers, '
        f'{len(result.groups)} groups, {len(result.kept_float)} kept float, '
        f'method {result.method}, {result.num_batches} batches'
    )
    console.print(f'Wrote {out} and {html}')


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    args.command = shlex.join(['python', 'tools/calibrate.py', *words])
    if args.num_batches is not None and args.num_batches < 1:
        raise ValueError(f'--num-batches must be at least 1, got {args.num_batches}')
    console = open_console()
    run = Run(args, console)
    run.preflight()
    run.observe()
    result = run.finish()
    tell(result, run.strata, console, args.out, run.html)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is lost
    run_tool(main, interrupted='go on with --resume')
