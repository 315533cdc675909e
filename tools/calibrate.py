#!/usr/bin/env python
"""Calibrate a quantized model: find the range of every INT8 or FP8 layer from some data."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys

from mmengine.config import DictAction
from mmengine.dist import get_dist_info
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from terminal import ConsoleListener, open_console, run_tool

from mmdet3d_quant.calibration.stability import TOLERANCE
from mmdet3d_quant.core.spec import METHODS
from mmdet3d_quant.jobs.calibration import Calibrated, calibrate_checkpoint
from mmdet3d_quant.jobs.steps import RECIPES, SAME_ERROR, STEPS
from mmdet3d_quant.runs.processes import LAUNCHERS

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

  # what helps and is cheap; a recipe and one step more
  python tools/calibrate.py $CONFIG float.pth --out int8.pth --recipe fast
  python tools/calibrate.py $CONFIG float.pth --out int8.pth --recipe fast \\
      --learned-rounding img_backbone

  # inputs of concats, and channels of some layers, scaled alike; the float model stays as it is
  python tools/calibrate.py $CONFIG float.pth --out int8.pth --equalize-concats \\
      --equalize-layers pts_backbone --equalize-layers 'img_neck.*'

  # FP8 instead of INT8 for a part of the model (docs/fp8.md)
  python tools/calibrate.py $CONFIG float.pth --out fp8.pth \\
      --cfg-options model.pts_backbone.format=fp8 model.pts_neck.format=fp8

  # a detector with pillars, most of whose cells are empty; mean errors taken off biases
  python tools/calibrate.py $CONFIG float.pth --out int8.pth --empty-cells \\
      --bias-correction 'pts_backbone'

  # keep the first convolution float
  python tools/calibrate.py $CONFIG float.pth --out int8.pth \\
      --cfg-options model.img_backbone.skip="['conv1']"

The config may hold all that: calibration=dict(method='mse', overrides={'pts_neck': 'max'},
weights='max', recipe='fast', steps=dict(equalize_layers=['pts_backbone'])). The output is an
ordinary checkpoint: mmdet3d's init_model and tools/test.py load it. Beside it lies a report, OUT
with .html instead of .pth.
"""


def tables() -> str:
    """Describes methods, steps in their order, and recipes."""
    recipes = {name: ', '.join(steps) for name, steps in RECIPES.items()}
    text = ''
    for title, rows in dict(methods=METHODS, recipes=recipes).items():
        text += f'\n{title}:\n' + ''.join(f'  {name:10}  {what}\n' for name, what in rows.items())
    only = ' and '.join(SAME_ERROR)
    return text + (
        f'\nOf {only} a calibration has one: a recipe takes the first\n'
        'that serves the model, unless you name the other. The steps run in the order in which\n'
        'their options are listed.\n'
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE + tables(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('config', help='config with Quant* types')
    add('checkpoint', help='float checkpoint')
    add('--out', required=True, help='checkpoint to write')
    add('--num-batches', type=int, help='batches to use; default: all')
    add('--method', action='append', default=[], metavar='[PATTERN=]METHOD',
        help=f'{", ".join(METHODS)}, or percentile:99.9 to choose it; may be repeated, with a '
        "pattern of module names for a part of the model; default: the config's, or "
        'mse')  # fmt: skip
    add('--weights', choices=['max', 'mse'], help="default: the config's, or max")
    add('--until-stable', nargs='?', type=float, const=TOLERANCE, metavar='TOLERANCE',
        help='stop when 95%% of the ranges moved less than this share while the batches doubled, '
        'twice in a row; default: %(const)s')  # fmt: skip
    add('--recipe', choices=RECIPES, help='steps for what is there, see below; others add to it')
    for step in STEPS:
        if step.flag:
            add(step.option, action='store_true', help=step.help)
        else:
            add(step.option, action='append', default=[], metavar='PATTERN',
                help=f"{step.help}; may be repeated; '*': all")  # fmt: skip
    add('--resume', action='store_true', help='go on where an interrupted run stopped')
    add('--strict', action='store_true', help='a warning is an error: nothing is written')
    add('--launcher', choices=LAUNCHERS, default='none', help='job launcher')
    add('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    add('--device', help='cpu or cuda[:N]; default: a GPU where there is one')
    add('--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE overrides of the config')
    return parser.parse_args(argv)


def tell(made: Calibrated, console: Console, out: str) -> None:
    """Prints the gist: the worst layers, whether it was enough data, what stays float."""
    result, strata = made.calibration, made.strata
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
    for line in result.coverage.lines():
        console.print(line, markup=False)
    layers = {layer.name for layer in result.coverage.layers}
    for name, reason in result.kept_float.items():
        if name.rpartition('.')[0] not in layers:  # of a join
            console.print(f'float: {name} ({reason})', markup=False)
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
        f'{len(result.groups)} groups, {len(result.kept_float)} quantizers kept float, '
        f'method {result.method}, {result.num_batches} batches'
    )
    console.print(result.coverage.summary())
    console.print(f'Wrote {out} and {made.page}')


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    if args.num_batches is not None and args.num_batches < 1:
        raise ValueError(f'--num-batches must be at least 1, got {args.num_batches}')
    console = open_console()
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn())
    made = calibrate_checkpoint(
        args.config,
        args.checkpoint,
        args.out,
        methods=args.method,
        weights=args.weights,
        num_batches=args.num_batches,
        until_stable=args.until_stable,
        resume=args.resume,
        strict=args.strict,
        steps={step.name: getattr(args, step.name) for step in STEPS},
        recipe=args.recipe,
        launcher=args.launcher,
        device=args.device,
        overrides=args.cfg_options,
        command=shlex.join(['python', 'tools/calibrate.py', *words]),
        listener=ConsoleListener(console, *columns, TimeRemainingColumn()),
    )
    if get_dist_info()[0] == 0:
        tell(made, console, args.out)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is lost
    run_tool(main, interrupted='go on with --resume')
