#!/usr/bin/env python
"""Accuracy and time of each calibration method on the tiny BEVFusion.

Every row is one method at one width of the activations' integers: mAP and NDS on the validation
scenes with the 95 % interval of the difference to float, SQNR of the features that the head reads
on the first validation batches, and the seconds that calibration took.

Example:
    python benchmarks/calibration_methods.py --out work_dirs/methods

Rows that a former run finished are read from the folder, not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accuracy_ladder import CHECKPOINT, CONFIG, measured
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import mmdet3d_quant as mq
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.data.evaluation import Scorer, Scores, bootstrap, predict
from mmdet3d_quant.files.outputs import sha256, whole
from mmdet3d_quant.runs import from_config as fc

METHODS = ('max', 'percentile:99.99', 'entropy', 'mse', 'auto')


@dataclass
class Row:
    """One method at one width.

    Attributes:
        name: How the table calls it.
        seconds: Time of the whole calibration.
        sqnr: Of the head's input against float, dB; NaN for float itself.
    """

    name: str
    seconds: float
    sqnr: float


def features(model: nn.Module, batches: list) -> list[Tensor]:
    """What the neck of the decoder gives to the head."""
    seen: list[Tensor] = []
    hook = model.pts_neck.register_forward_hook(lambda *a: seen.append(a[2][0].clone()))
    with torch.no_grad():
        for batch in batches:
            model.test_step(batch)
    hook.remove()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', default=CONFIG)
    parser.add_argument('--checkpoint', default=CHECKPOINT)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/methods'))
    parser.add_argument('--calib-batches', type=int, default=16, help='default: %(default)s')
    parser.add_argument('--bits', type=int, nargs='+', default=(8, 4), help='of activations')
    args = parser.parse_args()
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)

    cfg = fc.read_config(args.config)
    model = fc.build_model(cfg)
    fc.load_weights(model, args.checkpoint, calibrated=False)
    _, loader = fc.build_calibration_loader(cfg)
    batches = list(islice(loader, args.calib_batches))
    loader = Runner.build_dataloader(cfg.val_dataloader, seed=0)
    scorer = Scorer(cfg.val_evaluator, loader.dataset.metainfo)
    held_out = list(islice(loader, 4))
    mq.set_mode(model, 'float')
    reference = torch.cat(features(model, held_out))
    key = dict(
        checkpoint=sha256(args.checkpoint),
        calib_batches=args.calib_batches,
        data=str(cfg.val_evaluator['data_root']),
    )

    def measure(method: str | None, bits: int, name: str) -> tuple[Row, Scores]:
        mq.set_mode(model, 'float')
        row = Row(name, 0.0, float('nan'))
        if method is not None:
            for full_name, quantizer in mq.quantizers(model).items():
                if not full_name.endswith('_weight_quantizer'):
                    quantizer.spec = replace(quantizer.spec, num_bits=bits)
            start = time.perf_counter()
            mq.calibrate(model, track(batches, f'  calibrating {name}'), method)
            row.seconds = time.perf_counter() - start
            row.sqnr = sqnr(reference, torch.cat(features(model, held_out)))
        scores = scorer.score(predict(model, track(loader, f'  testing {name}')))
        console.print(f'{name}: mAP {scores.mAP:.4f}, {row.sqnr:.1f} dB, {row.seconds:.1f} s')
        return row, scores

    def row(method: str | None, bits: int, name: str) -> tuple[Row, Scores]:
        return measured(args.out, dict(key, setting=name), lambda: measure(method, bits, name))

    found = [row(None, 8, 'float')]
    for bits in args.bits:
        found += [row(method, bits, f'a{bits} {method}') for method in METHODS]
    report(found, args.out, console)


def report(found: list[tuple[Row, Scores]], folder: Path, console: Console) -> None:
    """The table, on the console and in files."""
    draws = bootstrap([scores for _, scores in found])
    table = Table('setting', 'mAP', 'NDS', 'mAP - float', '95 % interval', 'SQNR, dB', 'time, s')
    lines = ['| setting | mAP | NDS | mAP - float, points | 95 % interval | SQNR, dB | time, s |']
    lines.append('|---|---|---|---|---|---|---|')
    entries = []
    for (row, scores), luck in strict_zip(found, draws):
        change = 100 * (luck - draws[0])
        low, high = np.percentile(change, [2.5, 97.5])
        points = 100 * (scores.mAP - found[0][1].mAP)
        cells = (
            row.name,
            f'{scores.mAP:.4f}',
            f'{scores.NDS:.4f}',
            f'{points:+.2f}',
            f'{low:+.2f} to {high:+.2f}',
            f'{row.sqnr:.1f}',
            f'{row.seconds:.1f}',
        )
        table.add_row(*cells)
        lines.append('| ' + ' | '.join(cells) + ' |')
        entries.append(dict(asdict(row), mAP=scores.mAP, NDS=scores.NDS, change=points))
    console.print(table)
    with whole(folder / 'methods.md') as part:
        part.write_text('\n'.join(lines) + '\n')
    with whole(folder / 'methods.json') as part:
        part.write_text(json.dumps(entries, indent=1))
    console.print(f'Wrote methods.md and methods.json to {folder}')


if __name__ == '__main__':
    main()
