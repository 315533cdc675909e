#!/usr/bin/env python
"""Cost of INT8 in the LiDAR encoder of the tiny BEVFusion: naive, our defaults, after QAT, and as
Autoware computes it by choice of stages.

*Naive* quantizes every layer, the first one too, with one range per weight tensor and ranges of
activations by ``max``. The defaults keep the first convolution float, have one range per output
channel and choose by ``mse``. Rows of *Autoware* run the traced encoder in its arithmetic, with
what is behind it float: none of its layers in INT8, those from stage 3 on, all but the first
convolution, all; and all with a given range of the first convolution's input. Every row is mAP
and NDS on the validation scenes with the 95 % interval of its difference to float.

Example:
    python benchmarks/accuracy_lidar.py --out work_dirs/lidar

Rows that a former run finished are read from the folder, not measured again.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from accuracy_ladder import CHECKPOINT, ROOT, compared, measured, tell
from mmengine.runner import Runner
from qat_recovery import Setting as Training
from qat_recovery import train
from rich.console import Console
from rich.progress import track
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.data.evaluation import Scorer, Scores, predict
from mmdet3d_quant.export.sparse import trace
from mmdet3d_quant.export.sparse.arithmetic import AUTOWARE, with_int8
from mmdet3d_quant.export.sparse.run import ScnEncoder, ScnNetwork
from mmdet3d_quant.files.outputs import sha256, whole
from mmdet3d_quant.runs import from_config as fc

FOLDER = ROOT / 'configs/bevfusion_tiny'
CONFIG = FOLDER / 'bevfusion_tiny_lidar-cam_int8-all_synthetic.py'
QAT = FOLDER / 'bevfusion_tiny_lidar-cam_qat-all_synthetic.py'
LIDAR = 'pts_middle_encoder'


#: Layers that Autoware computes in INT8, by choice.
STAGES = {
    'none': (),
    'stage 3 on': AUTOWARE.int8,
    'all but first': ('encoder_layers', 'conv_out'),
    'all': ('*',),
}


@dataclass(frozen=True)
class Setting:
    """One row.

    Attributes:
        part: ``'LiDAR'``, ``'rest'`` (camera branch and decoder) or ``'all'``: what is quantized.
        method: How ranges of activations are chosen.
        naive: One range per weight tensor, and the first convolution quantized too.
        bits: Width of the integers.
        int8: Name in :data:`STAGES`, to compute in Autoware's arithmetic.
        first: Range of the first convolution's input, which has metres (to 36), intensity (to 255)
            and seconds (to 0.3) in one tensor; 0: as the method chooses it.
    """

    part: str
    method: str = 'mse'
    naive: bool = False
    bits: int = 8
    int8: str = ''
    first: float = 0

    def __str__(self) -> str:
        if self.int8:
            first = f', first to {self.first}' if self.first else ''
            return f'Autoware {self.int8} {"naive " if self.naive else ""}{self.method}{first}'
        what = 'all but LiDAR' if self.part == 'rest' else self.part
        width = '' if self.bits == 8 else f' {self.bits} bits'
        return f'{what}{width} {"naive " if self.naive else ""}{self.method}'


SETTINGS = (
    Setting('rest'),
    Setting('LiDAR', 'max', naive=True),
    Setting('LiDAR'),
    Setting('all', 'max', naive=True),
    Setting('all'),
    Setting('LiDAR', 'max'),
    Setting('LiDAR', 'percentile:99.99'),
    Setting('LiDAR', 'entropy'),
    Setting('LiDAR', 'max', naive=True, bits=6),
    Setting('LiDAR', bits=6),
    Setting('LiDAR', 'max', naive=True, bits=4),
    Setting('LiDAR', bits=4),
    Setting('LiDAR', int8='none'),
    Setting('LiDAR', int8='stage 3 on'),
    Setting('LiDAR', int8='all'),
    Setting('LiDAR', 'max', naive=True, int8='all'),
    Setting('LiDAR', int8='all but first'),
    Setting('LiDAR', 'max', naive=True, int8='stage 3 on'),
    Setting('LiDAR', 'max', int8='all'),
    Setting('LiDAR', 'max', int8='all', first=54),
    Setting('LiDAR', 'max', int8='all', first=122),
)


def build(naive: bool) -> nn.Module:
    """The model with float weights; naive: nothing is kept float."""
    cfg = fc.read_config(CONFIG)
    if naive:
        cfg.model[LIDAR].skip = ()
    model = fc.build_model(cfg)
    fc.load_weights(model, CHECKPOINT, calibrated=False)
    return model


def calibrated(setting: Setting, batches: list) -> nn.Module:
    """The model of a row."""
    model = build(setting.naive or setting.int8 == 'all')
    by_name = mq.quantizers(model)
    for quantizer in by_name.values():
        quantizer.spec = replace(quantizer.spec, num_bits=setting.bits)
    mq.calibrate(model, track(batches, f'  calibrating {setting}'), setting.method)
    for name, quantizer in by_name.items():
        if setting.naive and quantizer.spec.axis is not None:
            quantizer.amax = quantizer.amax.max().expand(quantizer.amax.shape)
        if setting.part != 'all' and name.startswith(LIDAR) != (setting.part == 'LiDAR'):
            quantizer.mode = 'float'
    if setting.first:
        first = by_name[f'{LIDAR}.conv_input.0._input_quantizer']
        first.amax = torch.full_like(first.amax, setting.first)
    if setting.int8:
        arithmetic = with_int8(AUTOWARE, STAGES[setting.int8])
        program = trace(getattr(model, LIDAR), arithmetic=arithmetic)
        setattr(model, LIDAR, ScnEncoder(ScnNetwork(program, fp16_tensors=True)))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/lidar'))
    parser.add_argument('--calib-batches', type=int, default=16, help='default: %(default)s')
    parser.add_argument('--only', nargs='+', help='rows to measure, by name; default: all')
    parser.add_argument('--iters', type=int, default=32, help='QAT steps; default: %(default)s')
    parser.add_argument('--batch-size', type=int, default=2, help='of QAT; default: %(default)s')
    parser.add_argument('--seeds', type=int, nargs='*', default=(0,), help='of QAT')
    args = parser.parse_args()
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    cfg = fc.read_config(CONFIG)
    _, calibration = fc.build_calibration_loader(cfg)
    batches = list(islice(calibration, args.calib_batches))
    loader = Runner.build_dataloader(cfg.val_dataloader, seed=0)
    scorer = Scorer(cfg.val_evaluator, loader.dataset.metainfo)
    key = dict(checkpoint=sha256(CHECKPOINT), calib_batches=args.calib_batches)

    def score(model: nn.Module, name: str) -> Scores:
        scores = scorer.score(predict(model, track(loader, f'  testing {name}')))
        console.print(f'{name}: mAP {scores.mAP:.4f}')
        return scores

    def as_float() -> Scores:
        model = build(naive=False)
        mq.set_mode(model, 'float')
        return score(model, 'float')

    rows = {'float': measured(args.out, dict(key, setting='float'), as_float)}
    for setting in SETTINGS:
        name = str(setting)
        if args.only and name not in args.only:
            continue

        def run(setting: Setting = setting, name: str = name) -> Scores:
            return score(calibrated(setting, batches), name)

        rows[name] = measured(args.out, dict(key, setting=name), run)
    for seed in args.seeds:
        name = f'all QAT seed {seed}'

        def trained(seed: int = seed, name: str = name) -> Scores:
            start = args.out / 'start.pth'
            model = calibrated(Setting('all'), batches)
            with whole(start) as part:
                torch.save(dict(state_dict=model.state_dict(), meta=dict(start='all mse')), part)
            folder = args.out / f'qat_{seed}'
            last = train(Training('good'), seed, folder, start, args.iters, args.batch_size, QAT)
            fc.load_weights(model, last, calibrated=True)
            return score(model, name)

        rows[name] = measured(args.out, dict(key, setting=name, iters=args.iters), trained)
    tell(compared(rows), args.out, 'lidar', console)


if __name__ == '__main__':
    main()
