#!/usr/bin/env python
"""Worth of each sensor of the tiny BEVFusion, and the spread of scores over choices of scenes.

Rows: camera + LiDAR in float and in INT8, the same with the images of other frames, LiDAR alone,
cameras alone, and the cameras' boxes put into other frames: what chance gives. Each on every
validation set that is given, with the standard deviation and the 95 % interval of the difference
to camera + LiDAR (bootstrap over layouts).

Example, after training the three models as checkpoints/README.md says:
    for s in 1 2; do python tools/make_synthetic_nuscenes.py --out data/synthetic_seed$s \\
        --seed $s --samples 2 --val-samples 80; done
    python benchmarks/accuracy_sensors.py --data data/synthetic data/synthetic_seed1 \\
        data/synthetic_seed2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_ladder import CHECKPOINT, ROOT, measured
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mmdet3d_quant as mq
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.data.evaluation import Scorer, Scores, bootstrap, predict
from mmdet3d_quant.files.outputs import sha256, whole
from mmdet3d_quant.runs import from_config as fc

CONFIGS = ROOT / 'configs/bevfusion_tiny'
FUSION, INT8 = 'camera + LiDAR', 'camera + LiDAR, INT8'
BLIND, LIDAR = 'camera + LiDAR, images of other frames', 'LiDAR'
CAMERA, CHANCE = 'camera', 'camera, boxes of other frames'
#: Row -> config.
ROWS = {
    FUSION: 'bevfusion_tiny_lidar-cam_synthetic',
    INT8: 'bevfusion_tiny_lidar-cam_int8_synthetic',
    BLIND: 'bevfusion_tiny_lidar-cam_synthetic',
    LIDAR: 'bevfusion_tiny_lidar_synthetic',
    CAMERA: 'bevfusion_tiny_cam_synthetic',
    CHANCE: 'bevfusion_tiny_cam_synthetic',
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--fusion', type=Path, default=CHECKPOINT, help='checkpoint; default: %(default)s')
    add('--lidar', type=Path, help='checkpoint of the LiDAR model; its row is omitted without')
    add('--near', action='store_true', help='the near models; give their files and data')
    add('--camera', type=Path, help='checkpoint of the camera model; likewise')
    add('--calib-batches', type=int, default=8, help='of the calib_dataloader')
    add('--data', nargs='+', default=['data/synthetic'], help='validation sets')
    add('--out', type=Path, default=Path('work_dirs/sensors'))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    paths = {
        FUSION: args.fusion, INT8: args.fusion, BLIND: args.fusion,
        LIDAR: args.lidar, CAMERA: args.camera, CHANCE: args.camera,
    }  # fmt: skip
    console, report = Console(), []
    for data in args.data:
        rows = {
            name: row(name, path, data, args) for name, path in paths.items() if path is not None
        }
        draws = bootstrap(list(rows.values()))
        table = Table(data, 'mAP', '+-', 'NDS', 'mAP - fusion', '95 % interval')
        for (name, scores), luck in strict_zip(rows.items(), draws):
            change = 100 * (scores.mAP - rows[FUSION].mAP)
            low, high = np.percentile(100 * (luck - draws[0]), [2.5, 97.5])
            report.append(
                dict(data=data, row=name, mAP=scores.mAP, std=luck.std(), NDS=scores.NDS,
                     change=change, interval=[low, high], ap=scores.ap, errors=scores.errors)
            )  # fmt: skip
            numbers = f'{scores.mAP:.4f}', f'{luck.std():.4f}', f'{scores.NDS:.4f}'
            table.add_row(name, *numbers, f'{change:+.2f}', f'{low:+.2f} to {high:+.2f}')
        console.print(table)
    with whole(args.out / 'sensors.json') as part:
        part.write_text(json.dumps(report, indent=1))
    console.print(f'Wrote {args.out / "sensors.json"}')


def row(name: str, checkpoint: Path, data: str, args: argparse.Namespace) -> Scores:
    """Scores of a row on a validation set; kept in the output folder."""
    options = dict(args=args, data=data, checkpoint=checkpoint)
    return measured(args.out, _key(name, **options), lambda: score(name, **options))


def _key(name: str, checkpoint: Path, data: str, args: argparse.Namespace) -> dict[str, Any]:
    key = dict(setting=f'{name} {Path(data).name}', checkpoint=sha256(checkpoint))
    return dict(key, **(dict(calib_batches=args.calib_batches) if name == INT8 else {}))


def score(name: str, checkpoint: Path, data: str, args: argparse.Namespace) -> Scores:
    """Builds the model of a row and scores it."""
    parts = ROWS[name].split('_')
    if args.near:
        parts.insert(3, 'near')
    cfg = fc.read_config(CONFIGS / f'{"_".join(parts)}.py')
    model = fc.build_model(cfg)
    fc.load_weights(model, checkpoint, calibrated=False)
    if name == INT8:
        _, batches = fc.build_calibration_loader(cfg)
        some = [b for b, _ in zip(batches, range(args.calib_batches))]
        mq.calibrate(model, track(some, '  calibrating'), 'mse')
    cfg.val_dataloader.dataset.data_root = f'{data}/'
    evaluator = dict(cfg.val_evaluator, data_root=f'{data}/')
    evaluator['ann_file'] = f'{data}/nuscenes_infos_val.pkl'
    loader = Runner.build_dataloader(cfg.val_dataloader, seed=0)
    batches = track(loader, f'  {name}, {data}')
    results = predict(model, strangers(batches) if name == BLIND else batches)
    if name == CHANCE:
        boxes = [r['pred_instances_3d'] for r in results]
        far = len(boxes) // 2
        for result, other in strict_zip(results, boxes[far:] + boxes[:far]):
            result['pred_instances_3d'] = other
    return Scorer(evaluator, loader.dataset.metainfo).score(results)


def strangers(batches: Any) -> Iterator[dict]:
    """Batches in which every frame has the images of the next but one, of another layout."""
    for batch in batches:
        images = batch['inputs']['img']
        if len(images) < 4:
            sys.exit('images are exchanged within a batch: set val_dataloader.batch_size to 4')
        batch['inputs']['img'] = images[2:] + images[:2]
        yield batch


if __name__ == '__main__':
    main()
