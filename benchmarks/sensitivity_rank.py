#!/usr/bin/env python
"""Does the cheap score of `tools/sensitivity.py` rank units as their loss of mAP does?

For a model that is hard to quantize, with ranges alone: the noise at the head's maps that gradients
predict for each unit, the same measured on two frames, and the mAP that is lost on the validation
scenes with only this unit quantized, by the labels and by the boxes that the float model is sure
of. Compared are ranks (Spearman), with the 95 % interval over resampled scenes, and what a score
costs beside a calibration.

Example:
    python benchmarks/sensitivity_rank.py --width w4a8 --unit block

Rows that a former run finished are read from the folder, not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
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
from mmdet3d_quant.data.evaluation import Scores, bootstrap, predict
from mmdet3d_quant.files.outputs import sha256, whole
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.sensitivity.boxes import Boxes, as_truth, boxes_of, score
from mmdet3d_quant.sensitivity.measure import LEAST_SCORE, Bench
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

    def scores(self, unit: Unit | None) -> tuple[Scores, list[Boxes]]:
        """Scores and boxes on the validation scenes with only a unit quantized, or none."""
        members = self.bench.members
        names = [q for name in (unit.members if unit else ()) for q in members[name]]

        def run() -> tuple[Scores, list[Boxes]]:
            mq.set_mode(self.model, 'float')
            known = mq.quantizers(self.model)
            for name in names:
                known[name].mode = 'quant'
            title = f'  {unit.name if unit else "float"}'
            found = predict(self.model, track(self.models.loader, title))
            boxes = [boxes_of(SimpleNamespace(**sample)) for sample in found]
            return self.models.scorer.score(found), boxes

        what = f'{self.args.width} {unit.name.replace("/", " ") if unit else "float"}'
        key = dict(setting=what, quantizers=names, checkpoint=sha256(self.models.checkpoint))
        return measured(self.models.out, key, run)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all units, and compares ranks."""
    ranks = Ranks(args)
    predicted, seconds = ranks.predicted()
    alone, more = ranks.alone()
    rows = [ranks.scores(unit) for unit in (None, *ranks.units)]
    sure = [as_truth(boxes, LEAST_SCORE) for boxes in rows[0][1]]
    by_label = (
        [100 * scores.mAP for scores, _ in rows],
        100 * bootstrap([scores for scores, _ in rows]),
    )
    by_float = tuple(zip(*(score(boxes, sure) for _, boxes in rows)))
    losses = {
        name: (values[0] - np.array(values[1:]), np.array(draws[0]) - np.array(draws[1:]))
        for name, (values, draws) in dict(labels=by_label, float=by_float).items()
    }
    noises = dict(predicted=predicted, alone=alone)
    return dict(
        model=args.model,
        width=args.width,
        unit=args.unit,
        frames=len(ranks.frames),
        units=[
            dict(
                name=unit.name,
                **{name: noise[i] for name, noise in noises.items()},
                **{name: float(loss[i]) for name, (loss, _) in losses.items()},
                **{f'{name}_std': float(draws[i].std()) for name, (_, draws) in losses.items()},
            )
            for i, unit in enumerate(ranks.units)
        ],
        spearman={
            f'{what} noise, {name}': agreement(noise, *losses[name])
            for what, noise in noises.items()
            for name in losses
        },
        itself={name: agreement(list(both[0]), *both) for name, both in losses.items()},
        calibrations=dict(predicted=seconds / ranks.calibration, alone=more / ranks.calibration),
    )


def agreement(noise: list[float], losses: np.ndarray, draws: np.ndarray) -> list[float]:
    """Spearman's rank correlation of noise and losses, and the ends of its 95 % interval."""
    luck = [spearmanr(noise, column)[0] for column in draws.T]
    return [float(spearmanr(noise, losses)[0]), *np.percentile(luck, [2.5, 97.5])]


def main() -> None:
    args = parse_args()
    console = Console()
    found = report(args)
    table = Table('unit', 'predicted noise', 'measured', 'lost by labels', 'by float boxes')
    for row in sorted(found['units'], key=lambda row: -row['float']):
        noises = (f'{row[k]:.3g}' for k in ('predicted', 'alone'))
        losses = (f'{row[k]:+.2f} ± {row[f"{k}_std"]:.2f}' for k in ('labels', 'float'))
        table.add_row(row['name'], *noises, *losses)
    console.print(table)
    path = args.out / f'{args.model}_{args.width}_{args.unit}.json'
    with whole(path) as part:
        Path(part).write_text(json.dumps(found, indent=1))
    console.print({k: v for k, v in found.items() if k != 'units'}, f'Wrote {path}', sep='\n')


if __name__ == '__main__':
    main()
