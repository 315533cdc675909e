#!/usr/bin/env python
"""Cost of quantization of the tiny BEVFusion: bits, methods and branches, one at a time.

Every row is the mAP and NDS of one setting on the validation scenes, with the 95 % interval of
its difference to float (bootstrap over layouts, the same draws for all rows).

Example:
    python benchmarks/accuracy_ladder.py --out work_dirs/ladder

Rows that a former run finished are read from the folder, not measured again.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.figure import Figure
from mmengine.config import DictAction
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.formats import FP8, Bits
from mmdet3d_quant.data.evaluation import Scorer, Scores, bootstrap, predict
from mmdet3d_quant.files.outputs import sha256, whole
from mmdet3d_quant.runs import from_config as fc

Result = TypeVar('Result')
ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_int8_synthetic.py'
CHECKPOINT = ROOT / 'checkpoints/bevfusion_tiny_lidar-cam_synthetic.pth'
#: Bits of exponent and mantissa of FP8.
FP8_BITS = (4, 3)
#: Parts of the model by branch; the LiDAR encoder and the head are float throughout.
BRANCHES = {
    'camera': ('img_backbone', 'img_neck', 'view_transform'),
    'decoder': ('fusion_layer', 'pts_backbone', 'pts_neck'),
}


@dataclass(frozen=True)
class Setting:
    """One row.

    Attributes:
        weight_bits: Width of the weights' integers, or of exponent and mantissa.
        activation_bits: The same of activations.
        method: How ranges of activations are chosen.
        naive: One range per weight tensor instead of one per output channel.
        branches: Branches that are quantized.
    """

    weight_bits: Bits = 8
    activation_bits: Bits = 8
    method: str = 'mse'
    naive: bool = False
    branches: tuple[str, ...] = tuple(BRANCHES)

    def __str__(self) -> str:
        if not self.branches:
            return 'float'
        fp8 = self.weight_bits == self.activation_bits == FP8_BITS
        width = FP8.name if fp8 else f'w{self.weight_bits}a{self.activation_bits}'
        text = f'{width} {self.method}'
        text += ' naive' if self.naive else ''
        return text if len(self.branches) > 1 else f'{text} {self.branches[0]} only'


def settings() -> Iterator[Setting]:
    """All rows, the most important first."""
    yield Setting(branches=())
    for bits in (8, 6, 4):
        for method in ('mse', 'max'):
            yield Setting(bits, bits, method)
        yield Setting(bits, bits, 'max', naive=True)
    for bits in (8, 4):
        for branch in BRANCHES:
            yield Setting(bits, bits, branches=(branch,))
    yield Setting(4, 8)
    yield Setting(8, 4)
    yield Setting(FP8_BITS, FP8_BITS)
    for method in ('percentile:99.99', 'entropy'):
        yield Setting(method=method)


def apply(model: nn.Module, setting: Setting, batches: list) -> None:
    """Calibrates a model with float weights for a setting."""
    mq.set_mode(model, 'float')
    if not setting.branches:
        return
    by_name = mq.quantizers(model)
    for name, quantizer in by_name.items():
        weight = name.endswith('_weight_quantizer')
        bits = setting.weight_bits if weight else setting.activation_bits
        quantizer.spec = replace(quantizer.spec, num_bits=bits)
    mq.calibrate(model, track(batches, f'  calibrating {setting}'), setting.method)
    on = tuple(part for branch in setting.branches for part in BRANCHES[branch])
    for name, quantizer in by_name.items():
        if not name.startswith(on):
            quantizer.mode = 'float'
        if setting.naive and name.endswith('_weight_quantizer'):
            quantizer.amax = quantizer.amax.max().expand(quantizer.amax.shape)


def measured(folder: Path, key: dict, run: Callable[[], Result]) -> Result:
    """A row's result, from the folder if it is there for the same inputs."""
    path = folder / (key['setting'].replace(' ', '_').replace(':', '') + '.pkl')
    if path.is_file():
        known, result = pickle.loads(path.read_bytes())  # written by this script
        if known == key:
            return result
    result = run()
    with whole(path) as part:
        Path(part).write_bytes(pickle.dumps((key, result)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', default=CONFIG)
    parser.add_argument('--checkpoint', default=CHECKPOINT)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/ladder'))
    parser.add_argument('--calib-batches', type=int, default=8, help='of the calib_dataloader')
    parser.add_argument('--only', nargs='+', help='rows to measure, by name; default: all')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args()
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)

    cfg = fc.read_config(args.config, args.cfg_options)
    model = fc.build_model(cfg)
    fc.load_weights(model, args.checkpoint, calibrated=False)
    _, calibration = fc.build_calibration_loader(cfg)
    batches = [b for b, _ in zip(calibration, range(args.calib_batches))]
    loader = Runner.build_dataloader(cfg.val_dataloader, seed=0)
    scorer = Scorer(cfg.val_evaluator, loader.dataset.metainfo)
    key = dict(
        checkpoint=sha256(args.checkpoint),
        calib_batches=args.calib_batches,
        data=str(cfg.val_evaluator['data_root']),
    )

    rows: dict[str, Scores] = {}
    for setting in settings():
        if args.only and str(setting) not in ('float', *args.only):
            continue

        def run(setting: Setting = setting) -> Scores:
            start = time.time()
            apply(model, setting, batches)
            scores = scorer.score(predict(model, track(loader, f'  testing {setting}')))
            console.print(f'{setting}: mAP {scores.mAP:.4f}, {time.time() - start:.0f} s')
            return scores

        rows[str(setting)] = measured(args.out, dict(key, setting=str(setting)), run)

    report = compared(rows)
    tell(report, args.out, 'ladder', console)


def compared(rows: dict[str, Scores]) -> list[dict]:
    """Each row against the one named ``float``, with intervals of the same draws for all."""
    draws = bootstrap(list(rows.values()))
    base = draws[list(rows).index('float')]
    report = []
    for (name, scores), luck in strict_zip(rows.items(), draws):
        entry = dict(
            setting=name,
            mAP=scores.mAP,
            mAP_std=luck.std(),
            NDS=scores.NDS,
            change=100 * (scores.mAP - rows['float'].mAP),
            interval=list(np.percentile(100 * (luck - base), [2.5, 97.5])),
            ap=scores.ap,
        )
        report.append(entry)
    return report


def tell(report: list[dict], folder: Path, stem: str, console: Console) -> None:
    """Prints the rows, and writes them as JSON, as a table for documents and as a picture."""
    table = Table('setting', 'mAP', '+-', 'NDS', 'mAP - float', '95 % interval')
    for row in report:
        low, high = row['interval']
        table.add_row(
            row['setting'],
            f'{row["mAP"]:.4f}',
            f'{row["mAP_std"]:.4f}',
            f'{row["NDS"]:.4f}',
            f'{row["change"]:+.2f}',
            f'{low:+.2f} to {high:+.2f}',
        )
    console.print(table)
    with whole(folder / f'{stem}.json') as part:
        part.write_text(json.dumps(report, indent=1))
    with whole(folder / f'{stem}.md') as part:
        part.write_text(markdown(report))
    with whole(folder / f'{stem}.png') as part:
        draw(report).savefig(part, format='png', dpi=100)
    console.print(f'Wrote {stem}.json, {stem}.md and {stem}.png to {folder}')


def markdown(report: list[dict]) -> str:
    """The rows as a table for documents."""
    lines = ['| setting | mAP | +- | NDS | mAP - float, points | 95 % interval |']
    lines.append('|---|---|---|---|---|---|')
    for row in report:
        low, high = row['interval']
        interval = '' if row['setting'] == 'float' else f'{low:+.2f} to {high:+.2f}'
        lines.append(
            f'| {row["setting"]} | {row["mAP"]:.4f} | {row["mAP_std"]:.4f} | {row["NDS"]:.4f} '
            f'| {row["change"]:+.2f} | {interval} |'
        )
    return '\n'.join(lines) + '\n'


def draw(report: list[dict]) -> Figure:
    """Each row's difference to float with its interval."""
    figure = Figure(figsize=(8, 0.3 * len(report) + 1), layout='constrained')
    axes = figure.subplots()
    places = range(len(report))
    ends = np.array([row['interval'] for row in report]).T
    axes.hlines(places, *ends, color='#0072B2', lw=2)
    axes.plot([row['change'] for row in report], places, 'o', color='#0072B2')
    axes.set_yticks(places, [row['setting'] for row in report])
    axes.set(xlabel='mAP - float, points (95 % interval)', xscale='symlog')
    axes.invert_yaxis()
    axes.axvline(0, color='gray', lw=1)
    axes.grid(alpha=0.3)
    return figure


if __name__ == '__main__':
    main()
