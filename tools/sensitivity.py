#!/usr/bin/env python
"""Find which layers of a calibrated INT8 model cost accuracy, and write a config that mends it."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

from mmengine.config import DictAction
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from terminal import ConsoleListener, open_console, run_tool

from mmdet3d_quant.core.decibels import decibels
from mmdet3d_quant.jobs.mixed import Limits, Mixed
from mmdet3d_quant.jobs.sensitivity import Effort, Sensitivity, analyse_sensitivity
from mmdet3d_quant.sensitivity.cost import RATES
from mmdet3d_quant.sensitivity.measure import TRUTHS
from mmdet3d_quant.sensitivity.units import LEVELS

#: Rows of the table on the console; the report has all.
WORST = 15
EXAMPLE = """
examples:
  # which layers make the noise: predicted by gradients, then measured where it matters
  python tools/sensitivity.py $CONFIG int8.pth

  # by block; and what the boxes gain if one of the ten noisiest blocks is float
  python tools/sensitivity.py $CONFIG int8.pth --unit block --measure 10

  # a config that loses at most 0.2 points of mAP against the float model's boxes, in as little
  # time as can be; checked on frames that the search did not see
  python tools/sensitivity.py $CONFIG int8.pth --max-drop 0.2
  python tools/test.py sensitivity.py int8.pth

  # the most accurate within 5 % more time; with at least 35 dB at the head; both
  python tools/sensitivity.py $CONFIG int8.pth --max-latency 1.05
  python tools/sensitivity.py $CONFIG int8.pth --least-sqnr 35 --max-latency 1.1

  # times of layers measured in OpenVINO, of the folders that tools/export_onnx.py has written
  python tools/sensitivity.py $CONFIG int8.pth --onnx onnx/float onnx/int8

  # four processes; go on after an interruption
  python tools/sensitivity.py $CONFIG int8.pth --measure 20 --processes 4 --resume

docs/sensitivity.md tells what the numbers mean.
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    effort = Effort()
    add('config', help='config with quantized types')
    add('checkpoint', help='its calibrated checkpoint')
    add('--out', default='sensitivity',
        help='stem of the page, the JSON and the config; default: %(default)s')  # fmt: skip
    add('--unit', choices=LEVELS, default='layer',
        help='what becomes float at once, with what shares its scales; default: layer')  # fmt: skip
    add('--frames', type=int, default=effort.frames,
        help='frames to predict noise on; default: %(default)s')  # fmt: skip
    add('--probes', type=int, default=effort.probes,
        help='backward passes a frame; default: %(default)s')  # fmt: skip
    add('--alone', type=int, default=effort.alone, metavar='FRAMES',
        help='frames to measure units alone on, 0: only predict; default: %(default)s')  # fmt: skip
    add('--measure', type=int, default=effort.measure, metavar='N',
        help='score the boxes with each of the N noisiest units float')  # fmt: skip
    add('--box-frames', type=int, default=effort.boxes,
        help='frames to score boxes on; default: %(default)s')  # fmt: skip
    add('--check-frames', type=int, default=effort.check,
        help='other frames, to check a written config on; default: %(default)s')  # fmt: skip
    add('--truth', choices=TRUTHS, default='float',
        help="what boxes are scored by: the float model's (default) or labels")  # fmt: skip
    add('--max-drop', type=float, metavar='POINTS',
        help='write a config that loses at most so many points of mAP against float')  # fmt: skip
    add('--least-sqnr', type=float, metavar='DB',
        help='write a config with at least this SQNR at the head')  # fmt: skip
    add('--max-latency', type=float, metavar='TIMES',
        help='write a config that takes at most so many times as long as all INT8')  # fmt: skip
    add('--engine', choices=RATES, default='gpu',
        help='nominal engine of estimated times; default: %(default)s')  # fmt: skip
    add('--onnx', nargs=2, type=Path, metavar=('FLOAT', 'INT8'),
        help='exported folders (or files): their layers are timed in OpenVINO')  # fmt: skip
    add('--processes', type=int, default=1, help='default: %(default)s')
    add('--resume', action='store_true', help='go on where an interrupted run stopped')
    add('--force', action='store_true', help='replace a config that is there')
    add('--device', help='cpu or cuda[:N]; default: a GPU where there is one')
    add('--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE overrides of the config')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    given = (args.max_drop, args.least_sqnr, args.max_latency)
    limits = Limits(*given) if any(value is not None for value in given) else None
    if limits and any(key.startswith('model') for key in args.cfg_options or ()):
        raise ValueError(
            '--cfg-options of the model would be missing in the config that is written: write them '
            'into a config of your own first'
        )
    effort = Effort(
        args.frames, args.probes, args.alone, args.measure, args.box_frames, args.check_frames
    )
    console = open_console()
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn())
    listener = ConsoleListener(console, *columns, TimeRemainingColumn())
    measured = None
    if args.onnx:
        from mmdet3d_quant.check.layer_times import layer_times  # which needs OpenVINO

        measured = layer_times(*args.onnx, listener=listener)
    made = analyse_sensitivity(
        args.config,
        args.checkpoint,
        args.out,
        level=args.unit,
        effort=effort,
        limits=limits,
        truth=args.truth,
        rates='cpu' if measured else args.engine,
        measured=measured,
        processes=args.processes,
        resume=args.resume,
        force=args.force,
        device=args.device,
        overrides=args.cfg_options,
        command=shlex.join(['python', 'tools/sensitivity.py', *words]),
        listener=listener,
    )
    tell(made, console)
    console.print(f'Wrote {made.page} and {made.page.with_suffix(".json")}')
    return tell_config(made.mixed, console) if made.mixed else 0


def tell(made: Sensitivity, console: Console) -> None:
    """Prints the noisiest units, and what float costs them."""
    facts = made.facts
    title = 'noisiest first; all in the report' if len(made.rows) > WORST else 'noisiest first'
    headings = ('SQNR, dB', 'noise, %', 'gain, points', 'time added, %', 'MB added', 'conversions')
    table = Table('unit', title=title)
    for heading in headings:
        table.add_column(heading, justify='right')
    for row in made.rows[:WORST]:
        share = row.noise / facts['noise'] if facts['noise'] else 0
        gain = '' if row.gain is None else f'{row.gain:+.2f} ± {row.spread:.2f}'
        table.add_row(
            row.unit.name,
            f'{decibels(1, row.noise):.1f}' + ('' if row.alone is not None else ' (predicted)'),
            f'{share:.1%}'.rstrip('%'),
            gain,
            f'{100 * row.cost["seconds"] / facts["int8"]["seconds"]:+.2f}',
            f'{row.cost["bytes"] / 1e6:+.2f}',
            f'{row.cost["conversions"]:+d}',
        )
    console.print(table)
    scores = facts['scores']
    if scores:
        console.print(f'mAP: float {scores["float"]:.2f}, all INT8 {scores["int8"]:.2f} points')


def tell_config(mixed: Mixed, console: Console) -> int:
    """Prints how the config did; returns the exit code."""
    seen = mixed.unseen
    text = f'on unseen frames {decibels(1, seen["noise"]):.1f} dB'
    if seen['drop'] is not None:
        text += f', {seen["drop"]:.2f} points lost'
    if mixed.path is None:
        console.print(f'All INT8: {text}; no config was written')
    else:
        times = mixed.total.seconds / mixed.before.seconds
        more = mixed.total.conversions - mixed.before.conversions
        console.print(
            f'Wrote {mixed.path}: {len(mixed.units)} units float, {times:.3f} times as long as all '
            f'INT8, {more:+d} conversions; {text} (all INT8 '
            f'{decibels(1, seen["noise_int8"]):.1f} dB)'
        )
    if mixed.problem:
        console.print(f'[red]The limits do not hold[/red]: {mixed.problem}')
    return 1 if mixed.problem else 0


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is lost
    run_tool(main, failure=2, interrupted='go on with --resume')
