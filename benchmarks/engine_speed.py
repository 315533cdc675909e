#!/usr/bin/env python
"""Speed of the ResNet-50 BEVFusion's INT8 files in OpenVINO, against float and against NNCF's.

Weights are random with batch norm of the inputs, ranges calibrated on four random inputs, which
NNCF gets too; closeness is measured on two others. Engines take turns in one process.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from mmengine.config import DictAction
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.export import Cut, bevfusion_cuts, export_onnx, generate_inputs
from mmdet3d_quant.runs import from_config as fc

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))
import benchmark_onnx  # noqa: E402
from terminal import open_console  # noqa: E402

CONFIG = ROOT / 'configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn_int8_nus-3d.py'
PARTS = ('camera.backbone', 'camera.vtransform', 'fuser', 'head.bbox')
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
  python benchmarks/engine_speed.py --cfg-options model.img_backbone.skip="['conv1']"
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
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='of the INT8 config')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/engine_speed'))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    open_console()
    folder = args.work_dir
    for name in VARIANTS:  # files of a run with other parts would be measured too
        shutil.rmtree(folder / name, ignore_errors=True)
    torch.manual_seed(0)
    model = fc.build_model(fc.read_config(CONFIG, args.cfg_options))
    model.init_weights()
    inputs = {seed: generate_inputs(model, args.cams, seed) for seed in CALIBRATION + SAMPLES}
    for cut in bevfusion_cuts(model, inputs[CALIBRATION[0]]):
        if cut.name in args.parts:
            make_files(cut, inputs, folder)
    for name, seeds in (('calibration', CALIBRATION), ('samples', SAMPLES)):
        tensors = {n: [inputs[s][n].numpy() for s in seeds] for n in inputs[seeds[0]]}
        np.savez(folder / f'{name}.npz', **{n: np.stack(found) for n, found in tensors.items()})
    command = [*(folder / name for name in VARIANTS), '--json', folder / 'speed.json']
    command += ['--threads', args.threads, '--runs', args.runs, '--inputs', folder / 'samples.npz']
    if args.nncf_python:
        command += ['--nncf-python', args.nncf_python]
        command += ['--nncf-inputs', folder / 'calibration.npz']
    benchmark_onnx.main([str(word) for word in command])


@torch.no_grad()
def make_files(cut: Cut, inputs: dict[int, dict[str, torch.Tensor]], folder: Path) -> None:
    """Weights and ranges for a part, and its files."""
    samples = {seed: [found[n] for n in cut.inputs] for seed, found in inputs.items()}
    settle_norms(cut.module, samples[CALIBRATION[0]])
    if mq.quantizers(cut.module):
        mq.calibrate(cut.module, [samples[seed] for seed in CALIBRATION], 'mse')
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


@torch.no_grad()
def settle_norms(module: nn.Module, inputs: list[torch.Tensor]) -> None:
    """Gives the batch norms of random weights the statistics of some inputs."""
    norms = [m for m in module.named_modules() if hasattr(m[1], 'running_mean')]
    for name, norm in norms:
        if name.endswith('bn3'):
            nn.init.constant_(norm.weight, 0.3)  # zero-initialised; trained ones are small
        norm.momentum = 1.0
        norm.train()
    with mq.set_mode(module, 'float'):
        module(*inputs)
    module.eval()


if __name__ == '__main__':
    main()
