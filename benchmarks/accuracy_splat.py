#!/usr/bin/env python
"""Cost of INT8 behind the splat of the tiny BEVFusion: `downsample` and the map of the head.

One calibration; rows differ in what is quantized beside the camera branch and the decoder. Every
row is mAP and NDS on the validation scenes with the 95 % interval of its difference to float.

Example:
    python benchmarks/accuracy_splat.py --out work_dirs/splat

Rows that a former run finished are read from the folder, not measured again.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from accuracy_ladder import CHECKPOINT, CONFIG, compared, measured, tell
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track

import mmdet3d_quant as mq
from mmdet3d_quant.data.evaluation import Scorer, Scores, predict
from mmdet3d_quant.files.outputs import sha256
from mmdet3d_quant.runs import from_config as fc

#: All that can be quantized is, so that rows only choose from it.
OPTIONS = {'model.view_transform.quantize_downsample': True, 'model.bbox_head.scores': True}
DOWNSAMPLE, LAST, MAP = 'view_transform.downsample', 'bbox_head.heatmap_head.1', 'bbox_head'
#: Rows, and what stays float in each.
ROWS = {
    'camera and decoder': (DOWNSAMPLE, MAP),
    "and the head's map but its last layer": (DOWNSAMPLE, LAST),
    "and the head's map": (DOWNSAMPLE,),
    'and downsample': (MAP,),
    "and downsample and the head's map": (),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/splat'))
    parser.add_argument('--calib-batches', type=int, default=8, help='default: %(default)s')
    args = parser.parse_args()
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    cfg = fc.read_config(CONFIG, OPTIONS)
    model = fc.build_model(cfg)
    fc.load_weights(model, CHECKPOINT, calibrated=False)
    _, calibration = fc.build_calibration_loader(cfg)
    batches = list(islice(calibration, args.calib_batches))
    mq.calibrate(model, track(batches, '  calibrating'), 'mse')
    loader = Runner.build_dataloader(cfg.val_dataloader, seed=0)
    scorer = Scorer(cfg.val_evaluator, loader.dataset.metainfo)
    key = dict(checkpoint=sha256(CHECKPOINT), calib_batches=args.calib_batches)

    rows: dict[str, Scores] = {}
    for name, kept in {'float': ('',), **ROWS}.items():

        def run(name: str = name, kept: tuple[str, ...] = kept) -> Scores:
            for at, quantizer in mq.quantizers(model).items():
                quantizer.mode = 'float' if at.startswith(kept) else 'quant'
            scores = scorer.score(predict(model, track(loader, f'  testing {name}')))
            console.print(f'{name}: mAP {scores.mAP:.4f}')
            return scores

        rows[name] = measured(args.out, dict(key, setting=name), run)
    tell(compared(rows), args.out, 'splat', console)


if __name__ == '__main__':
    main()
