#!/usr/bin/env python
"""Recovery by QAT of the tiny BEVFusion: from good ranges, and from ruined ones.

Two starts: ``good``, the default calibration, and ``outlier``, in which every activation range is
16 times that of ``max``, as if one calibration value in each tensor had been 16 times the largest
(8 bits then tell as much apart as 4). From each, several trainings with several seeds, through
tools/train.py and the QAT config; then mAP and NDS on the validation scenes, of the model that
is deployed, with integers in the forward pass.

Example:
    python benchmarks/qat_recovery.py --out work_dirs/qat

Rows that a former run finished are read from the folder, not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accuracy_ladder import CHECKPOINT, CONFIG, ROOT, measured
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mmdet3d_quant as mq
from mmdet3d_quant.data.evaluation import Scorer, Scores, bootstrap, predict
from mmdet3d_quant.files.outputs import sha256, whole
from mmdet3d_quant.runs import from_config as fc

QAT = ROOT / 'configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_qat_synthetic.py'
#: Models of the config with quantizers.
PARTS = (
    'img_backbone', 'img_neck', 'view_transform', 'fusion_layer', 'pts_backbone', 'pts_neck'
)  # yapf: disable  # fmt: skip
OUTLIER = 16.0


@dataclass(frozen=True)
class Setting:
    """One training.

    Attributes:
        start: ``'good'`` or ``'outlier'``.
        learn: Whether ranges of activations are learned.
        distill: Whether the float model teaches.
        lr: Learning rate of the weights.
        range_lr: Learning rate of learned ranges: by what share a step changes one at most.
        longer: Factor on the number of steps.
    """

    start: str
    learn: bool = False
    distill: bool = True
    lr: float = 2e-5
    range_lr: float = 0.4
    longer: int = 1

    def __str__(self) -> str:
        text = f'{self.start}, QAT {"learned" if self.learn else "fixed"} ranges'
        text += '' if self.distill else ', no distillation'
        text += '' if self.lr == 2e-5 else f', lr {self.lr:g}'
        text += '' if self.range_lr == 0.4 else f', lr of ranges {self.range_lr:g}'
        return text + ('' if self.longer == 1 else f', {self.longer} times the steps')


SETTINGS = (
    Setting('good'),
    Setting('outlier', learn=True),
    Setting('outlier', learn=True, longer=4),
)
#: What chose the numbers of the config; with the first seed only.
ABLATIONS = (
    Setting('outlier'),
    Setting('outlier', learn=True, range_lr=0.2),
    Setting('outlier', learn=True, range_lr=0.2, distill=False),
    Setting('outlier', learn=True, range_lr=0.2, lr=2e-4),
    Setting('outlier', learn=True, range_lr=0.2, longer=4),
    Setting('outlier', learn=True, range_lr=0.8, longer=4),
    Setting('good', lr=2e-4),
)


def start_from(path: Path, start: str, batches: int) -> Path:
    """Writes the calibrated checkpoint of a start."""
    if path.is_file():
        return path
    cfg = fc.read_config(CONFIG)
    model = fc.build_model(cfg)
    fc.load_weights(model, CHECKPOINT, calibrated=False)
    _, loader = fc.build_calibration_loader(cfg)
    found = track(islice(loader, batches), f'  calibrating {start}', total=batches)
    mq.calibrate(model, found, 'mse' if start == 'good' else 'max')
    if start == 'outlier':
        for quantizer in mq.quantizers(model).values():
            if quantizer.spec.axis is None and quantizer.amax is not None:
                quantizer.amax = quantizer.amax * OUTLIER
    with whole(path) as part:
        torch.save(dict(state_dict=model.state_dict(), meta=dict(start=start)), part)
    return path


def train(
    setting: Setting,
    seed: int,
    folder: Path,
    start: Path,
    iters: int,
    batch_size: int,
    config: Path = QAT,
) -> Path:
    """Runs tools/train.py and returns the last checkpoint."""
    last = folder / f'iter_{iters * setting.longer}.pth'
    if last.is_file():
        return last
    cfg = fc.read_config(config)
    cfg.load_from = str(start)
    cfg.train_dataloader.batch_size = batch_size
    cfg.custom_hooks[1].checkpoint = str(start)
    cfg.custom_hooks = cfg.custom_hooks[: 2 if setting.distill else 1]
    cfg.optim_wrapper.optimizer.lr = setting.lr
    iters *= setting.longer
    cfg.train_cfg = dict(by_epoch=False, max_iters=iters, val_interval=10 * iters)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    warm, cosine = cfg.param_scheduler
    warm.update(end=iters // 8)
    cosine.update(by_epoch=False, begin=0, T_max=iters, end=iters)
    cosine.pop('convert_to_iter_based')
    cfg.default_hooks.checkpoint.update(interval=iters, by_epoch=False)
    cfg.randomness = dict(seed=seed)
    if setting.learn:
        for part in PARTS:
            cfg.model[part].learn_amax = True
        cfg.optim_wrapper.paramwise_cfg = dict(
            custom_keys={'_amax': dict(lr_mult=setting.range_lr / setting.lr, decay_mult=0)}
        )
    folder.mkdir(parents=True, exist_ok=True)
    cfg.dump(folder / 'config.py')
    command = [sys.executable, str(ROOT / 'tools/train.py'), str(folder / 'config.py')]
    with open(folder / 'train.txt', 'w') as log:
        done = subprocess.run(
            [*command, '--work-dir', str(folder)], stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode:
        sys.exit(f'error: the training failed; see {folder / "train.txt"}')
    return last


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/qat'))
    parser.add_argument('--iters', type=int, default=32, help='steps; default: %(default)s')
    parser.add_argument('--batch-size', type=int, default=2, help='default: %(default)s')
    parser.add_argument('--seeds', type=int, nargs='+', default=(0, 1, 2))
    parser.add_argument('--calib-batches', type=int, default=16, help='default: %(default)s')
    parser.add_argument('--only', nargs='+', help='trainings to measure, by name; default: all')
    args = parser.parse_args()
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    cfg = fc.read_config(CONFIG)
    model = fc.build_model(cfg)
    loader = Runner.build_dataloader(cfg.val_dataloader, seed=0)
    scorer = Scorer(cfg.val_evaluator, loader.dataset.metainfo)

    def score(checkpoint: Path, name: str, mode: str = 'quant') -> Scores:
        key = dict(checkpoint=sha256(checkpoint), mode=mode, setting=name)

        def run() -> Scores:
            fc.load_weights(model, checkpoint, calibrated=mode == 'quant')
            with mq.set_mode(model, mode):
                return scorer.score(predict(model, track(loader, f'  testing {name}')))

        found = measured(args.out, key, run)
        console.print(f'{name}: mAP {found.mAP:.4f}')
        return found

    starts = {
        s: start_from(args.out / f'{s}.pth', s, args.calib_batches) for s in ('good', 'outlier')
    }
    rows = {'float': [score(CHECKPOINT, 'float', 'float')]}
    for name, path in starts.items():
        rows[f'{name}, PTQ'] = [score(path, f'{name} PTQ')]
    for setting in (*SETTINGS, *ABLATIONS):
        if args.only and str(setting) not in args.only:
            continue
        for seed in args.seeds if setting in SETTINGS else args.seeds[:1]:
            name = f'{setting}'.replace(',', '')
            folder = args.out / f'{name} {seed}'.replace(' ', '_')
            last = train(setting, seed, folder, starts[setting.start], args.iters, args.batch_size)
            rows.setdefault(str(setting), []).append(score(last, f'{name} {seed}'))
        report(rows, args.out, console)


def report(rows: dict[str, list[Scores]], folder: Path, console: Console) -> None:
    """The table, on the console and in files."""
    base = rows['float'][0]
    luck = bootstrap([base])[0].std()
    table = Table('setting', 'seeds', 'mAP', 'spread', 'NDS', 'mAP - float', title='mAP and NDS')
    lines = ['| setting | seeds | mAP | spread of seeds | NDS | mAP - float, points |']
    lines.append('|---|---|---|---|---|---|')
    entries = []
    for name, found in rows.items():
        mAP, nds = _mean([s.mAP for s in found]), _mean([s.NDS for s in found])
        spread = float(np.std([s.mAP for s in found], ddof=1)) if len(found) > 1 else 0.0
        change = 100 * (mAP - base.mAP)
        cells = (
            name,
            str(len(found)),
            f'{mAP:.4f}',
            f'{spread:.4f}' if spread else '',
            f'{nds:.4f}',
            f'{change:+.2f}',
        )
        table.add_row(*cells)
        lines.append('| ' + ' | '.join(cells) + ' |')
        entries.append(dict(setting=name, mAP=[s.mAP for s in found], NDS=[s.NDS for s in found]))
    console.print(table)
    console.print(f'Which scenes are drawn moves the mAP of float by {100 * luck:.2f} points (std)')
    with whole(folder / 'qat.md') as part:
        part.write_text('\n'.join(lines) + '\n')
    with whole(folder / 'qat.json') as part:
        part.write_text(json.dumps(entries, indent=1))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


if __name__ == '__main__':
    main()
