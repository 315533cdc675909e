#!/usr/bin/env python
"""Score exported files: the detector with engines in the place of its layers, mmdet3d's metric."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch import add_common, runner_config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from terminal import open_console, run_tool
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.check.detector import as_exported, engine_detector, manifest_problems
from mmdet3d_quant.engines import ENGINES, make_engine
from mmdet3d_quant.export import ExportError
from mmdet3d_quant.export.manifest import read_manifest
from mmdet3d_quant.runs import from_config as fc

EXAMPLE = """
examples:
  CONFIG=configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_int8_synthetic.py

  # mAP and NDS of the files in onnx/int8, which tools/export_onnx.py made of int8.pth
  python tools/test_onnx.py $CONFIG int8.pth onnx/int8

  # beside those of the fake-quantized torch model
  python tools/test_onnx.py $CONFIG int8.pth onnx/int8 --engine onnxruntime --fake-quant

What is not in a file (voxels, sparse encoder, BEV pooling, decoding of boxes) runs in torch. Files
for Autoware have all but voxels and decoding, and run whole with --engine onnxruntime.
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='test config')
    parser.add_argument('checkpoint', help='checkpoint that the files were exported from')
    parser.add_argument('folder', type=Path, help='files and manifest.json, of export_onnx.py')
    parser.add_argument('--engine', choices=ENGINES, default='openvino', help='default: openvino')
    parser.add_argument('--threads', type=int, default=2, help='default: %(default)s')
    parser.add_argument(
        '--fake-quant', action='store_true', help='score the torch model too, and the difference'
    )
    parser.add_argument(
        '--scn',
        action='store_true',
        help="run the LiDAR encoder's file too, as libspconv would; OpenVINO's, and its BEV "
        'pooling, by ONNX Runtime',
    )
    parser.add_argument(
        '--force', action='store_true', help='go on with files of another checkpoint'
    )
    parser.add_argument('--work-dir', help='for the log and the metrics; default: work_dirs/CONFIG')
    add_common(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    console = open_console()
    if args.launcher != 'none':
        raise ValueError('engines run in one process: leave --launcher away')
    manifest = read_manifest(args.folder)
    if manifest.get('runtime') == 'autoware' and not args.engine.startswith('onnxruntime'):
        raise ValueError(
            f"{args.folder} has Autoware's plugin nodes, which {args.engine} lacks: take "
            '--engine onnxruntime'
        )
    problems = manifest_problems(manifest, args.folder, args.checkpoint)
    if problems and not args.force:
        raise ExportError('; '.join(problems) + '. Export again, or go on with --force')
    for problem in problems:
        console.print(f'[yellow]{problem}')
    int8 = manifest.get('precision') != 'float'
    cfg = runner_config(args, needs=('test_dataloader', 'test_evaluator'))
    cfg.load_from = None  # loaded below, strictly
    model = fc.build_model(cfg)
    fc.load_weights(model, args.checkpoint, calibrated=int8)
    fc.check_data(cfg, ['test_dataloader'])
    with mq.set_mode(model, 'quant' if int8 else 'float'):
        engines = engine_detector(
            model,
            args.folder,
            lambda path: make_engine(args.engine, path, args.threads),
            args.scn,
        )
        scores = {args.engine: evaluate(cfg, engines, args.engine, console)}
        if args.fake_quant:
            name = 'torch fake-quant' if int8 else 'torch float'
            own = as_exported(model, args.folder, args.scn)
            scores[name] = evaluate(cfg, own, name, console)
    console.print(table(scores))
    return scores[args.engine]


class _Bar(Hook):
    """Shows how far a test is."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.progress = progress
        self.title = title

    def before_test_epoch(self, runner: Runner) -> None:
        self.task = self.progress.add_task(self.title, total=len(runner.test_dataloader))

    def after_test_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        self.progress.advance(self.task)


def evaluate(cfg: Any, model: nn.Module, title: str, console: Console) -> dict[str, float]:
    """Scores of a detector on the config's test data."""
    console.print(f'Scoring {title}')
    runner = Runner.from_cfg(cfg)
    runner.model = model
    with Progress(console=console, transient=True) as progress:
        runner.register_hook(_Bar(progress, title))
        return runner.test()


def table(scores: dict[str, dict[str, float]]) -> Table:
    """mAP, NDS and the other metrics that all share, and the difference where there are two."""
    names = list(scores)
    result = Table('metric', *names, *(['difference'] if len(names) == 2 else []))
    metrics = [m for m in scores[names[0]] if all(m in s for s in scores.values())]
    short = {m: m.rsplit('/', 1)[-1] for m in metrics}
    for metric in sorted(metrics, key=lambda m: short[m] not in ('mAP', 'NDS')):
        if short[metric] not in ('mAP', 'NDS') and 'mAP' in short.values():
            continue
        values = [scores[name][metric] for name in names]
        row = [f'{value:.4f}' for value in values]
        if len(values) == 2:
            row.append(f'{values[0] - values[1]:+.4f}')
        result.add_row(short[metric], *row)
    return result


if __name__ == '__main__':
    run_tool(main)
