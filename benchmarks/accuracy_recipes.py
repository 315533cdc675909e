#!/usr/bin/env python
"""What each step of a recipe buys back, on models and at widths where quantization costs something.

Rows of a model: float, then for every width the ranges alone, with each step of the recipes, and
after a short QAT. Every row is mAP and NDS on the validation scenes with the 95 % interval of its
difference to float (bootstrap over layouts), and the minutes that it took to make on this machine.

Example:
    python benchmarks/accuracy_recipes.py --only centerpoint_tiny_depthwise --widths w4a8 w8a8

What a former run measured is read from the folder; remove the folder to begin anew.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accuracy_ladder import ROOT, compared, measured
from mmengine.config import Config
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.data.evaluation import Scorer, Scores, predict
from mmdet3d_quant.files.outputs import sha256, whole
from mmdet3d_quant.improve import (
    BiasCorrection,
    EmptyCells,
    LearnedRounding,
    NormReestimation,
    TaskRanges,
    equalize_concats,
    equalize_layers,
)
from mmdet3d_quant.jobs.steps import BY_NAME
from mmdet3d_quant.qat.optim import BFloat16OptimWrapper
from mmdet3d_quant.runs import from_config as fc

#: Model -> folder of its configs.
MODELS = {
    'bevfusion_tiny_lidar-cam_near': 'bevfusion_tiny',
    'centerpoint_tiny_depthwise': 'centerpoint_tiny',
    'bevfusion_tiny_cam_near': 'bevfusion_tiny',
    'bevfusion_tiny_lidar-cam': 'bevfusion_tiny',
    'centerpoint_tiny': 'centerpoint_tiny',
}
#: Bits of weights and activations.
WIDTHS = {'w8a8': (8, 8), 'w4a8': (4, 8), 'w6a6': (6, 6), 'w4a4': (4, 4)}
#: Changes before the ranges, ``change(model, batches)``; float does not notice them.
BEFORE: dict[str, Callable[[nn.Module, list], Any]] = {
    'concats': equalize_concats,
    'layers': lambda model, batches: equalize_layers(model, batches, ['*']),
}
#: Steps after the ranges, ``make(batches)``, in the order of ``jobs.steps.STEPS``.
AFTER: dict[str, Callable[[list], Any]] = {
    'task': lambda batches: TaskRanges(batches=2),
    'cells': lambda batches: EmptyCells(),
    'norms': lambda batches: NormReestimation(['*'], lambda: enumerate(batches)),
    'rounding': lambda batches: LearnedRounding(),
    'bias': lambda batches: BiasCorrection(),
}
EQUAL = ('concats', 'layers', 'cells')
#: Recipe -> steps of both; where a model has no pillars, there are no empty cells.
RECIPES: dict[str, Sequence[str]] = {
    'ranges only': (),
    '+ bias correction': ('bias',),
    '+ equalization': (*EQUAL, 'bias'),
    '+ equalization, norms': (*EQUAL, 'norms'),
    '+ task-guided ranges': (*EQUAL, 'task', 'norms'),
    '+ learned rounding': (*EQUAL, 'norms', 'rounding'),
    '+ both': (*EQUAL, 'task', 'norms', 'rounding'),
    'QAT': EQUAL,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--only', nargs='+', choices=MODELS, default=list(MODELS)[:2], help='%(default)s')
    add('--widths', nargs='+', choices=WIDTHS, default=list(WIDTHS), help='%(default)s')
    add('--recipes', nargs='+', choices=RECIPES, default=list(RECIPES), help='%(default)s')
    add('--out', type=Path, default=Path('work_dirs/recipes'))
    add('--calib-batches', type=int, default=8, help='of the calib_dataloader')
    add('--held-out', type=int, default=4, help='batches more, for the steps after the ranges')
    return parser.parse_args()


class Bench:
    """A model, its data and what was measured of it.

    Args:
        name: Key of :data:`MODELS`.
        args: Options of the script.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        self.out = args.out / name
        self.out.mkdir(parents=True, exist_ok=True)
        self.checkpoint = ROOT / 'checkpoints' / f'{name}_synthetic.pth'
        self.cfg = self.config('int8')
        self.cfg.calib_dataloader.num_workers = 0
        self.cfg.calib_dataloader.persistent_workers = False
        _, loader = fc.build_calibration_loader(self.cfg)
        count = args.calib_batches + args.held_out
        batches = [batch for batch, _ in zip(loader, range(count))]
        self.batches, self.held_out = batches[: args.calib_batches], batches[args.calib_batches :]
        self.loader = Runner.build_dataloader(self.cfg.val_dataloader, seed=0)
        self.scorer = Scorer(self.cfg.val_evaluator, self.loader.dataset.metainfo)

    def config(self, kind: str) -> Config:
        """Reads the config of a kind, ``'int8'`` or ``'qat'``."""
        path = ROOT / 'configs' / MODELS[self.name] / f'{self.name}_{kind}_synthetic.py'
        return fc.read_config(path)

    def model(self) -> nn.Module:
        """Builds the model with its float weights."""
        model = fc.build_model(self.cfg)
        fc.load_weights(model, self.checkpoint, calibrated=False)
        mq.set_mode(model, 'float')
        return model

    def calibrated(self, width: str, recipe: str) -> nn.Module:
        """Calibrates at a width with the steps of a recipe."""
        model, steps = self.model(), RECIPES[recipe]
        weight_bits, activation_bits = WIDTHS[width]
        for name, quantizer in mq.quantizers(model).items():
            bits = weight_bits if name.endswith('_weight_quantizer') else activation_bits
            quantizer.spec = replace(quantizer.spec, num_bits=bits)
        for step, change in BEFORE.items():
            if step in steps:
                change(model, self.batches)
        after = [
            make(self.batches)
            for step, make in AFTER.items()
            if step in steps and (step != 'cells' or BY_NAME['empty_cells'].serves(model))
        ]
        held_out = dict(held_out=self.held_out, after=after) if after else {}
        mq.calibrate(model, self.batches, 'mse', **held_out)
        for step in after:
            print(f'  {step}'[:400])
        if recipe == 'QAT':
            self.train(model, self.out / f'qat_{width}')
        return model

    def train(self, model: nn.Module, folder: Path) -> None:
        """Trains a calibrated model as the QAT config says, and leaves it in eval mode."""
        cfg = self.config('qat')
        # The teacher has the channels of the student, which equalization scaled.
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state_dict=model.state_dict(), meta={}), folder / 'start.pth')
        for hook in cfg.custom_hooks:
            if hook['type'] == 'DistillHook':
                hook['checkpoint'] = str(folder / 'start.pth')
        cfg.optim_wrapper.type = BFloat16OptimWrapper.__name__  # registered by its import
        runner = Runner(
            model=model,
            work_dir=str(folder),
            train_dataloader=cfg.train_dataloader,
            train_cfg=dict(by_epoch=True, max_epochs=cfg.train_cfg.max_epochs),
            optim_wrapper=cfg.optim_wrapper,
            param_scheduler=cfg.param_scheduler,
            default_hooks=dict(checkpoint=None, logger=dict(type='LoggerHook', interval=10)),
            custom_hooks=cfg.custom_hooks,
            load_from=str(folder / 'start.pth'),  # training initializes weights first
            randomness=cfg.randomness,
            default_scope='mmdet3d',
            experiment_name=f'{self.name}_{folder.name}',
            cfg=cfg,
        )
        runner.train()
        model.eval()

    def score(self, row: str, make: Callable[[], nn.Module]) -> Scores:
        """Scores a row, or reads it from the folder if the weights are the same."""

        def run() -> Scores:
            start = time.time()
            model = make()
            self.minutes(row, (time.time() - start) / 60)
            results = predict(model, track(self.loader, f'  {self.name}, {row}'))
            return self.scorer.score(results)

        batches = [len(self.batches), len(self.held_out)]
        key = dict(setting=row, checkpoint=sha256(self.checkpoint), batches=batches)
        return measured(self.out, key, run)

    def minutes(self, row: str, made: float | None = None) -> float:
        """Notes or reads the minutes that a row took to make."""
        path = self.out / 'minutes.json'
        known = json.loads(path.read_text()) if path.is_file() else {}
        if made is not None:
            known[row] = made
            with whole(path) as part:
                Path(part).write_text(json.dumps(known, indent=1))
        return known.get(row, 0.0)

    def rows(self) -> list[dict]:
        """Measures all rows; compares them with float."""
        found = {'float': self.score('float', self.model)}
        for width in self.args.widths:
            for recipe in self.args.recipes:
                row = f'{width} {recipe}'
                found[row] = self.score(row, lambda w=width, r=recipe: self.calibrated(w, r))
                change = 100 * (found[row].mAP - found['float'].mAP)
                print(f'{self.name}, {row}: {found[row].mAP:.4f}, {change:+.2f}', flush=True)
        report = compared(found)
        return [dict(row, model=self.name, minutes=self.minutes(row['setting'])) for row in report]


def markdown(report: list[dict]) -> str:
    """The rows as a table for documents."""
    lines = ['| setting | mAP | NDS | mAP - float, points | 95 % interval | minutes |']
    lines.append('|---|---|---|---|---|---|')
    for row in report:
        low, high = row['interval']
        first = row['setting'] == 'float'
        name = f'**{row["model"]}** float' if first else row['setting']
        interval = '' if first else f'{low:+.2f} to {high:+.2f}'
        lines.append(
            f'| {name} | {row["mAP"]:.4f} ± {row["mAP_std"]:.4f} | {row["NDS"]:.4f} '
            f'| {row["change"]:+.2f} | {interval} | {row["minutes"]:.1f} |'
        )
    return '\n'.join(lines) + '\n'


def main() -> None:
    args = parse_args()
    console = Console()
    report: list[dict] = []
    for name in args.only:
        report += Bench(name, args).rows()
    with whole(args.out / 'recipes.json') as part:
        Path(part).write_text(json.dumps(report, indent=1))
    with whole(args.out / 'recipes.md') as part:
        Path(part).write_text(markdown(report))
    console.print(markdown(report))
    console.print(f'Wrote recipes.json and recipes.md to {args.out}')


if __name__ == '__main__':
    main()
