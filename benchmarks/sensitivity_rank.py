#!/usr/bin/env python
"""Does the cheap score of `tools/sensitivity.py` rank units as their loss of mAP does?

For a model that is hard to quantize, with ranges alone: the noise at the head's maps that gradients
predict for each unit, the same measured on two frames, and the loss of mAP on the validation scenes
with only this unit quantized. Compared are ranks (Spearman), with the 95 % interval over
resampled layouts, and what a score costs beside a calibration.

Example:
    python benchmarks/sensitivity_rank.py --width w4a8 --unit block

Rows that a former run finished are read from the folder, not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_ladder import measured
from accuracy_recipes import MODELS, WIDTHS
from accuracy_recipes import Bench as Models
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import spearmanr

import mmdet3d_quant as mq
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.data.evaluation import Scores, bootstrap, predict
from mmdet3d_quant.files.outputs import sha256, whole
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.sensitivity.measure import Bench
from mmdet3d_quant.sensitivity.rows import predicted_noise
from mmdet3d_quant.sensitivity.units import LEVELS, Unit, find_units


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--model', choices=MODELS, default='centerpoint_tiny_depthwise', help='%(default)s')
    add('--width', choices=WIDTHS, default='w4a8', help='%(default)s')
    add('--unit', choices=LEVELS, default='block', help='%(default)s')
    add('--frames', type=int, default=16, help='on which noise is predicted (%(default)s)')
    add('--out', type=Path, default=Path('work_dirs/sensitivity_rank'))
    args = parser.parse_args()
    args.calib_batches, args.held_out = 8, 0
    return args


class Ranks:
    """A calibrated model, whose units are scored by noise and by mAP.

    Args:
        args: Options of the script.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.models = args, Models(args.model, args)
        start = time.time()
        self.model = self.models.calibrated(args.width, 'ranges only')
        self.calibration = time.time() - start
        cfg = self.models.cfg
        _, loader = fc.build_calibration_loader(cfg)
        self.frames = [i for batch in fc.batch_indices(loader) for i in batch][: args.frames]
        self.bench = Bench(self.model, lambda i: next(fc.numbered_batches(loader, {0: [i]}))[1])
        self.units = find_units(self.model, args.unit)

    def predicted(self) -> tuple[list[float], float]:
        """Noise by unit, predicted, and seconds."""
        start = time.time()
        found = [self.bench.predict(i, 4)['products'] for i in track(self.frames, 'predicting')]
        return [predicted_noise(u, found) or 0.0 for u in self.units], time.time() - start

    def alone(self) -> tuple[list[float], float]:
        """Noise by unit, measured on two frames with only this one quantized, and seconds."""
        start, some = time.time(), self.frames[:2]
        found = [self.bench.noise(u.members, some) for u in track(self.units, 'measuring noise')]
        return found, time.time() - start

    def scores(self, unit: Unit | None) -> Scores:
        """Scores on the validation scenes with only a unit quantized, or none."""
        members = self.bench.members
        names = [q for name in (unit.members if unit else ()) for q in members[name]]

        def run() -> Scores:
            mq.set_mode(self.model, 'float')
            known = mq.quantizers(self.model)
            for name in names:
                known[name].mode = 'quant'
            title = f'  {unit.name if unit else "float"}'
            return self.models.scorer.score(predict(self.model, track(self.models.loader, title)))

        what = f'{self.args.width} {unit.name.replace("/", " ") if unit else "float"}'
        key = dict(setting=what, quantizers=names, checkpoint=sha256(self.models.checkpoint))
        return measured(self.models.out, key, run)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all units, and compares ranks."""
    ranks = Ranks(args)
    predicted, seconds = ranks.predicted()
    alone, more = ranks.alone()
    rows = [ranks.scores(unit) for unit in (None, *ranks.units)]
    draws = 100 * bootstrap(rows)
    losses = [100 * (rows[0].mAP - row.mAP) for row in rows[1:]]
    lost = draws[0] - draws[1:]

    def agreement(noise: list[float]) -> dict[str, Any]:
        luck = [spearmanr(noise, column)[0] for column in lost.T]
        return dict(
            spearman=float(spearmanr(noise, losses)[0]),
            interval=list(np.percentile(luck, [2.5, 97.5])),
        )

    luck = [spearmanr(losses, column)[0] for column in lost.T]
    return dict(
        model=args.model,
        width=args.width,
        unit=args.unit,
        frames=len(ranks.frames),
        units=[
            dict(name=u.name, predicted=p, alone=a, loss=loss, std=float(std))
            for u, p, a, loss, std in strict_zip(ranks.units, predicted, alone, losses, lost.std(1))
        ],
        predicted=agreement(predicted),
        alone=agreement(alone),
        mAP_with_itself=list(np.percentile(luck, [2.5, 97.5])),
        calibrations=dict(predicted=seconds / ranks.calibration, alone=more / ranks.calibration),
    )


def main() -> None:
    args = parse_args()
    console = Console()
    found = report(args)
    table = Table('unit', 'predicted noise', 'measured', 'loss of mAP, points', '+-')
    for row in sorted(found['units'], key=lambda row: -row['loss']):
        numbers = (f'{row[k]:.3g}' for k in ('predicted', 'alone'))
        table.add_row(row['name'], *numbers, f'{row["loss"]:+.2f}', f'{row["std"]:.2f}')
    console.print(table)
    path = args.out / f'{args.model}_{args.width}_{args.unit}.json'
    with whole(path) as part:
        Path(part).write_text(json.dumps(found, indent=1))
    console.print({k: v for k, v in found.items() if k != 'units'}, f'Wrote {path}', sep='\n')


if __name__ == '__main__':
    main()
