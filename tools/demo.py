#!/usr/bin/env python
"""Run all steps on a small trained BEVFusion: data, float scores, INT8 scores, files, report.

Generates a part of the synthetic nuScenes, scores the trained checkpoint in float, calibrates it,
scores the INT8 simulation and the exported INT8 files, and writes a report. Needs no GPU and no
download. A second run reuses what is there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from demo_steps import Demo
from rich.table import Table
from terminal import Steps, open_console, run_tool

import mmdet3d_quant as mq
from mmdet3d_quant.check.detector import engine_detector
from mmdet3d_quant.core.spec import Method
from mmdet3d_quant.files.checkpoint import CheckpointError
from mmdet3d_quant.files.outputs import check_writable
from mmdet3d_quant.report.page import HEADLINES, verdict
from mmdet3d_quant.synthetic.generate import check_arguments
from mmdet3d_quant.synthetic.record import Settings
from mmdet3d_quant.synthetic.tables import TRAIN_SCENES, VAL_SCENES

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_int8_synthetic.py'
CHECKPOINT = ROOT / 'checkpoints/bevfusion_tiny_lidar-cam_synthetic.pth'
#: Names of the models that are scored.
FLOAT, SIMULATED, ENGINE = 'float', 'INT8 simulated', 'INT8 files'
EXAMPLE = """
examples:
  python tools/demo.py                                # what `make demo` does
  python tools/demo.py --samples 80                   # twice the validation frames
  python tools/demo.py --checkpoint mine.pth --method entropy --work-dir /tmp/demo

tools/demo_full_size.py shows the speed of a ResNet-50 BEVFusion, with random weights.
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--work-dir', default='work_dirs/demo', help='for everything; default: %(default)s')
    add('--checkpoint', default=str(CHECKPOINT), help='float checkpoint; default: the one here')
    add('--samples', type=int, default=40, help='key frames of each of 2 validation scenes, an '
        'even number; default: %(default)s')  # fmt: skip
    add('--train-samples', type=int, default=8, help='key frames of each of 8 training scenes, '
        'to calibrate on, an even number; default: %(default)s')  # fmt: skip
    add('--method', default='mse', help='calibration method; default: %(default)s')
    add('--pictures', type=int, default=4, help='frames to draw; default: %(default)s')
    add('--score-thr', type=float, default=0.15, help='least score of a drawn box; %(default)s')
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Checks the arguments before a long run.

    Raises:
        CheckpointError: If the checkpoint is missing.
        OSError: If the work directory cannot be written to.
        ValueError: If an option makes no sense.
    """
    Method.parse(args.method)
    samples = dict.fromkeys(TRAIN_SCENES, args.train_samples)
    samples.update(dict.fromkeys(VAL_SCENES, args.samples))
    check_arguments(samples, Settings(), None)
    if args.pictures < 0:
        raise ValueError(f'--pictures must not be negative, got {args.pictures}')
    if not Path(args.checkpoint).is_file():
        raise CheckpointError(
            f'checkpoint {args.checkpoint} does not exist; name one with --checkpoint, or train '
            'it: tools/train.py configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_synthetic.py'
        )
    check_writable(Path(args.work_dir) / 'report/report.html')


def run(args: argparse.Namespace, command: str) -> Path:
    """Does all steps; returns the path of the report."""
    console = open_console()
    steps = Steps(console, 7)
    demo = Demo(CONFIG, args.checkpoint, args.work_dir, steps)
    with steps.step('float checkpoint'):
        demo.load(command)
    with steps.step('synthetic nuScenes'):
        demo.make_data(args.train_samples, args.samples)
    with steps.step('mAP and NDS, float'), mq.set_mode(demo.model, 'float'):
        demo.score(FLOAT, lambda: demo.model)
    with steps.step('calibration'):
        demo.calibrate(args.method)
    with steps.step('mAP and NDS, INT8 simulated in torch'):
        demo.score(SIMULATED, lambda: demo.model)
    with steps.step('export; mAP, NDS and speed of the INT8 files in OpenVINO'):
        demo.export()
        demo.score(ENGINE, lambda: engine_detector(demo.model, demo.folders['int8']))
        demo.time_files()
    with steps.step('report'):
        told, path = demo.report((FLOAT, ENGINE), args.pictures, args.score_thr)
        console.print(comparison(told))
        for name, difference in told['differences'].items():
            console.print(verdict(name, difference))
        console.print(f'Report: {path}')
    return path


def comparison(told: dict[str, Any]) -> Table:
    """The report's numbers for the console."""
    scores = told['scores']
    table = Table('', *scores)
    for key in HEADLINES:
        row = [s[key] for s in scores.values()]
        table.add_row(key, *('-' if v is None else f'{v:.4f}' for v in row))
    table.add_section()
    for label in scores[FLOAT]['ap']:
        table.add_row(f'AP {label}', *(f'{s["ap"][label]:.4f}' for s in scores.values()))
    table.add_section()
    for file, times in told['latency'].items():
        slow, fast = (f'{1e3 * times[n]:.2f}' for n in ('float', 'int8'))
        table.add_row(f'{file}, ms', slow, '', fast)
    table.add_section()
    sizes = {**told['sizes'], 'weights of the quantized layers': told['weights']}
    for file, size in sizes.items():
        slow, fast = (f'{size[n] / 1e6:.2f}' for n in ('float', 'int8'))
        table.add_row(f'{file}, MB', slow, '', fast)
    return table


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    check_args(args)
    words = sys.argv[1:] if argv is None else argv
    return run(args, shlex.join(['python', 'tools/demo.py', *words]))


if __name__ == '__main__':
    run_tool(main, interrupted='the next run keeps the steps that were finished')
