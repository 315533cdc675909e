#!/usr/bin/env python
"""The whole way on a small trained BEVFusion: data, float scores, INT8 scores, files, report.

Generates a part of the synthetic nuScenes, scores the trained checkpoint in float, calibrates it,
scores the INT8 simulation and the exported INT8 files, and writes a report. Needs no GPU and no
download. A second run reuses what is there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import calibrate
import export_onnx
import make_synthetic_nuscenes
import numpy as np
import torch
from matplotlib.figure import Figure
from measure import load_boxes, measure, save_boxes
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from rich.progress import track
from rich.table import Table
from steps import Steps, digest
from terminal import open_console, run_tool
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.check.detector import engine_detector
from mmdet3d_quant.core.spec import Method
from mmdet3d_quant.data.evaluation import Scorer, Scores, predict
from mmdet3d_quant.export import capture_inputs
from mmdet3d_quant.export.deploy import engine_files
from mmdet3d_quant.files.checkpoint import CheckpointError
from mmdet3d_quant.files.outputs import check_writable, sha256, whole
from mmdet3d_quant.report import facts, write_report
from mmdet3d_quant.report.page import HEADLINES, verdict
from mmdet3d_quant.report.pictures import draw_frame, load_frame
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.synthetic.generate import check_arguments
from mmdet3d_quant.synthetic.record import Settings
from mmdet3d_quant.synthetic.tables import TRAIN_SCENES, VAL_SCENES

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_int8_synthetic.py'
CHECKPOINT = ROOT / 'checkpoints/bevfusion_tiny_lidar-cam_synthetic.pth'
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


class Demo:
    """One run: a method per step, and what the steps hand on.

    Args:
        args: From the command line.
        command: The command line, for the report.
    """

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        self.args = args
        self.command = command
        self.console = open_console()
        self.steps = Steps(self.console, 7)
        self.work = Path(args.work_dir)
        self.int8 = self.work / 'int8.pth'
        self.folders = {name: self.work / 'onnx' / name for name in ('float', 'int8')}
        self.key: dict[str, Any] = {}  # what decided everything so far
        self.results: dict[str, list] = {}
        self.scores: dict[str, Scores] = {}

    def run(self) -> Path:
        """Does all steps; returns the path of the report."""
        with self.steps.step('float checkpoint'):
            self.load()
        with self.steps.step('synthetic nuScenes'):
            self.make_data()
        with self.steps.step('mAP and NDS, float'), mq.set_mode(self.model, 'float'):
            self.score(FLOAT, lambda: self.model)
        with self.steps.step('calibration'):
            self.calibrate()
        with self.steps.step('mAP and NDS, INT8 simulated in torch'):
            self.score(SIMULATED, lambda: self.model)
        with self.steps.step('export; mAP, NDS and speed of the INT8 files in OpenVINO'):
            self.export()
            self.score(ENGINE, lambda: engine_detector(self.model, self.folders['int8']))
            self.time_files()
        with self.steps.step('report'):
            return self.report()

    def load(self) -> None:
        """Builds the model with its float weights."""
        cfg, checkpoint = fc.read_config(CONFIG), self.args.checkpoint
        self.model = fc.build_model(cfg)
        fc.load_weights(self.model, checkpoint, calibrated=False)
        self.source = facts.provenance_facts(cfg, checkpoint, self.command)
        self.source['config'] = str(CONFIG.relative_to(ROOT))
        found = self.source['checkpoint']
        self.console.print(f'{checkpoint}, SHA-256 {found["sha256"][:16]}...')
        self.key.update(checkpoint=found['sha256'], versions=self.source['versions'])
        self.key['code'] = digest([ROOT / 'mmdet3d_quant', ROOT / 'tools'])

    def make_data(self) -> None:
        """Generates the frames, and opens the validation set."""
        root, args = (self.work / 'nuscenes').resolve(), self.args
        command = ['--out', str(root), '--samples', str(args.train_samples), '--overwrite']
        command += ['--val-samples', str(args.samples)]
        data = dict(command=command, code=digest([ROOT / 'mmdet3d_quant/synthetic']))

        def make() -> None:
            for left in root.glob('.part-*'):  # of a run that was killed
                shutil.rmtree(left)
            make_synthetic_nuscenes.main(command)

        self.steps.once(root, data, make)
        cfg = fc.read_config(CONFIG)
        self.config = self.work / 'config.py'
        Config(replace_start(cfg.to_dict(), cfg.data_root, f'{root}/')).dump(self.config)
        self.cfg = fc.read_config(self.config)
        self.key.update(data=data, config=self.cfg.pretty_text)
        self.loader = Runner.build_dataloader(self.cfg.val_dataloader, seed=0)
        metainfo = self.cfg.val_dataloader.dataset.metainfo
        self.scorer = Scorer(self.cfg.val_evaluator.to_dict(), metainfo)

    def score(self, name: str, model: Callable[[], nn.Module]) -> None:
        """Scores a model on the validation frames."""
        path = self.work / f'boxes_{name.replace(" ", "_").lower()}.pth'

        def make() -> None:
            batches = track(self.loader, name, total=len(self.loader), console=self.console)
            save_boxes(predict(model(), batches), path)

        self.steps.once(path, {**self.key, 'model': name}, make)
        self.results[name] = load_boxes(path)
        found = self.scores[name] = self.scorer.score(self.results[name])
        self.console.print(f'{name}: mAP {found.mAP:.4f}, NDS {found.NDS:.4f}')

    def calibrate(self) -> None:
        """Runs tools/calibrate.py on the training frames."""
        command = [str(self.config), self.args.checkpoint, '--out', str(self.int8)]
        command += ['--method', self.args.method]
        self.key['method'] = self.args.method
        self.steps.once(self.int8, self.key, lambda: calibrate.main(command))
        self.meta = fc.load_weights(self.model, self.int8, calibrated=True)
        self.key['int8'] = sha256(self.int8)

    def export(self) -> None:
        """Runs tools/export_onnx.py, float and INT8."""
        for name, folder in self.folders.items():
            command = [str(self.config), str(self.int8), '--out-dir', str(folder)]
            command += ['--float', '--no-verify'] if name == 'float' else []
            key = {**self.key, 'precision': name}
            self.steps.once(folder, key, lambda c=command: export_onnx.main(c))

    def time_files(self) -> None:
        """Measures float and INT8 files on the first validation frame."""
        self.speed = self.work / 'speed.json'
        key = {**self.key, 'machine': self.source['machine']}

        def make() -> None:
            batch = pseudo_collate([self.loader.dataset[0]])
            with torch.no_grad():
                inputs = capture_inputs(self.model, batch)
            with whole(self.speed) as part:
                part.write_text(json.dumps(measure(inputs, self.folders), indent=1))

        self.steps.once(self.speed, key, make)

    def report(self) -> Path:
        """Writes the report and prints its gist."""
        sizes = {
            path.name: {name: (f / path.name).stat().st_size for name, f in self.folders.items()}
            for path in engine_files(self.folders['int8'])
        }
        told = dict(
            title='BEVFusion in INT8: tiny model, synthetic nuScenes',
            scores={name: facts.score_facts(s) for name, s in self.scores.items()},
            data=facts.data_facts(self.scores[FLOAT]),
            differences=facts.difference_facts(self.scores),
            **json.loads(self.speed.read_text()),
            sizes=sizes,
            weights=facts.weight_bytes(self.model),
            calibration=facts.calibration_facts(self.model, self.meta['calibration']),
            provenance=self.source,
            seconds=dict(self.steps.seconds),
        )
        path = write_report(self.work / 'report', told, self.pictures())
        self.console.print(comparison(told))
        for name, found in told['differences'].items():
            self.console.print(verdict(name, found))
        self.console.print(f'Report: {path}')
        return path

    def pictures(self) -> dict[str, Figure]:
        """Frames spread over the validation set, with the boxes of the first and last model."""
        dataset, least = self.loader.dataset, self.args.score_thr
        shown = {name: self.results[name] for name in (FLOAT, ENGINE)}
        figures = {}
        for index in np.linspace(0, len(dataset) - 1, self.args.pictures + 2).astype(int)[1:-1]:
            frame = load_frame(dataset, int(index), shown, least)
            figures[f'Validation frame {index}'] = draw_frame(frame, threshold=least)
        return figures


def replace_start(value: Any, old: str, new: str) -> Any:
    """A config with another start of its paths."""
    if isinstance(value, dict):
        return {k: replace_start(v, old, new) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(replace_start(v, old, new) for v in value)
    same = not isinstance(value, str) or not value.startswith(old)
    return value if same else new + value[len(old) :]


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


def check_args(args: argparse.Namespace) -> None:
    """Finds now what would end a long run.

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


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    check_args(args)
    words = sys.argv[1:] if argv is None else argv
    return Demo(args, shlex.join(['python', 'tools/demo.py', *words])).run()


if __name__ == '__main__':
    run_tool(main, interrupted='the next run keeps the steps that were finished')
