#!/usr/bin/env python
"""Speed of the ResNet-50 BEVFusion's INT8 files in OpenVINO, against float and against NNCF's.

Weights are random with batch norm of the inputs, ranges calibrated on four random inputs, which
NNCF gets too; closeness is measured on two others. Engines take turns in one process.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant import from_config as fc
from mmdet3d_quant.export import Cut, bevfusion_cuts, export_onnx, generate_inputs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))
import benchmark_onnx  # noqa: E402
from terminal import open_console  # noqa: E402

CONFIG = ROOT / 'configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn_int8_nus-3d.py'
PARTS = ('camera.backbone', 'fuser')
#: Variants by folder: whether quantized, and for which engine.
VARIANTS = {
    'float': (False, 'tensorrt'),
    'int8': (True, 'tensorrt'),
    'openvino': (True, 'openvino'),
}
CALIBRATION, SAMPLES = (1, 2, 3, 4), (5, 6)
EXAMPLE = """
examples:
  python benchmarks/engine_speed.py --nncf-python /tmp/nncf-venv/bin/python
  python benchmarks/engine_speed.py --cams 1 --parts camera.backbone --runs 10
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--cams', type=int, default=6, help='cameras; default: %(default)s')
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--runs', type=int, default=20)
    parser.add_argument('--nncf-python', help='Python with nncf, openvino and onnx')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/engine_speed'))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    open_console()
    torch.manual_seed(0)
    model = fc.build_model(fc.read_config(CONFIG))
    model.init_weights()
    inputs = {seed: generate_inputs(model, args.cams, seed) for seed in CALIBRATION + SAMPLES}
    for cut in bevfusion_cuts(model, inputs[CALIBRATION[0]]):
        if cut.name in args.parts:
            make_files(cut, inputs, args.work_dir)
    for part in args.parts:
        folders = [args.work_dir / part / name for name in VARIANTS]
        command = [*folders, '--threads', args.threads, '--runs', args.runs]
        command += ['--inputs', args.work_dir / part / 'samples.npz']
        command += ['--json', args.work_dir / part / 'speed.json']
        if args.nncf_python:
            command += ['--nncf-python', args.nncf_python]
            command += ['--nncf-inputs', args.work_dir / part / 'calibration.npz']
        benchmark_onnx.main([str(word) for word in command])


@torch.no_grad()
def make_files(cut: Cut, inputs: dict[int, dict[str, torch.Tensor]], work_dir: Path) -> None:
    """Weights and ranges for a part, and its files and inputs in ``work_dir``."""
    norms = [m for m in cut.module.named_modules() if hasattr(m[1], 'running_mean')]
    for name, norm in norms:
        if name.endswith('bn3'):
            nn.init.constant_(norm.weight, 0.3)  # zero-initialised; trained ones are small
        norm.momentum = 1.0
        norm.train()
    samples = {seed: [found[n] for n in cut.inputs] for seed, found in inputs.items()}
    with mq.set_mode(cut.module, 'float'):
        cut.module(*samples[CALIBRATION[0]])
    cut.module.eval()
    mq.calibrate(cut.module, [samples[seed] for seed in CALIBRATION], 'mse')
    folder = work_dir / cut.name
    for name, (quantized, target) in VARIANTS.items():
        export_onnx(
            cut.module,
            samples[CALIBRATION[0]],
            folder / name / f'{cut.name}.onnx',
            tuple(cut.inputs),
            cut.output_names,
            quantized=quantized,
            target=target,
        )
    for name, seeds in (('calibration', CALIBRATION), ('samples', SAMPLES)):
        stacked = [np.stack([samples[s][i].numpy() for s in seeds]) for i in range(len(cut.inputs))]
        np.savez(folder / f'{name}.npz', **dict(zip(cut.inputs, stacked, strict=True)))


if __name__ == '__main__':
    main()
