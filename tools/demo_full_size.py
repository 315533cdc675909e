#!/usr/bin/env python
"""Calibrate, export and run BEVFusion (ResNet-50, camera and LiDAR) in INT8, end to end.

The weights are random but fixed, like a trained network's in scale: the numbers show that every
step works and how fast INT8 is, not how accurate a trained model stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import calibrate
import export_onnx
import torch
from agreement import agreement_table
from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from terminal import open_console, run_tool
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.core.modes import float_state_dict
from mmdet3d_quant.data.samples import FRAME, frame_settings, make_frame, real_frame
from mmdet3d_quant.engines import OpenVINO, latency
from mmdet3d_quant.export import generate_inputs
from mmdet3d_quant.export.deploy import engine_files
from mmdet3d_quant.files.outputs import whole
from mmdet3d_quant.runs import from_config as fc

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn_int8_nus-3d.py'
EXAMPLE = """
examples:
  python tools/demo_full_size.py
  python tools/demo_full_size.py --frame work_dirs/other_frame --work-dir /tmp/demo
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--work-dir', default='work_dirs/demo_full_size', help='default: %(default)s'
    )
    parser.add_argument(
        '--frame',
        help=f'folder with a frame; default: that of {FRAME}, or a generated one',
    )
    parser.add_argument('--method', default='mse', help='calibration method')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    console = open_console()
    work_dir = Path(args.work_dir)
    console.rule('1/5 a frame and a config that reads it')
    config = frame_config(args.frame, work_dir, console)
    console.rule('2/5 weights, random but fixed')
    weights = work_dir / 'float.pth'
    save_weights(config, weights)
    console.print(f'Wrote {weights}')
    console.rule('3/5 tools/calibrate.py')
    int8 = str(work_dir / 'int8.pth')
    calibrate.main([str(config), str(weights), '--out', int8, '--method', args.method])
    console.rule('4/5 tools/export_onnx.py')
    folders = {'float': work_dir / 'onnx/float', 'int8': work_dir / 'onnx/int8'}
    export_onnx.main(
        [
            *(str(config), int8, '--out-dir', str(folders['float'])),
            *('--float', '--no-verify', '--no-compile'),
        ]
    )
    agreement = export_onnx.main([str(config), int8, '--out-dir', str(folders['int8'])])
    console.rule('5/5 latency in OpenVINO, 2 threads')
    console.print(latency_table(config, folders, console))
    console.print(agreement_table(agreement))
    console.print(f'Everything is in {work_dir}')


def frame_config(frame: str | None, work_dir: Path, console: Console) -> Path:
    """Writes the config for the frame; makes a frame if there is none."""
    folder = Path(frame) if frame else real_frame()
    if folder is None:
        folder = make_frame(work_dir / 'frame')
    console.print(f'Frame: {folder}')
    cfg = fc.read_config(CONFIG)
    full = cfg.to_dict()
    full.update(frame_settings(full, folder))
    path = work_dir / 'config.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    Config(full).dump(path)
    return path


@torch.no_grad()
def save_weights(config: Path, path: Path) -> None:
    """Random weights with BN statistics of the frame, so that every layer sees a sane range."""
    cfg = fc.read_config(config)
    torch.manual_seed(0)
    model = fc.build_model(cfg)
    model.init_weights()
    _, loader = fc.build_calibration_loader(cfg)
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if name.startswith('img_backbone') and name.endswith('bn3'):
                nn.init.constant_(m.weight, 0.3)  # zero-initialised; trained ones are small
            m.momentum = 1.0
            m.train()
    with mq.set_mode(model, 'float'):
        model.test_step(next(iter(loader)))
    with whole(path) as tmp:
        torch.save(dict(state_dict=float_state_dict(model), meta={}), tmp)


def latency_table(config: Path, folders: dict[str, Path], console: Console) -> Table:
    """Float and INT8 side by side, measured in this run."""
    inputs = generate_inputs(fc.build_model(fc.read_config(config)))
    table = Table('file', 'float ms', 'INT8 ms', 'speed-up', 'INT8 convs')
    total = {'float': 0.0, 'int8': 0.0}
    for path in engine_files(folders['int8']):
        console.print(f'Timing {path.name}')
        times = {}
        for precision, folder in folders.items():
            engine = OpenVINO(folder / path.name)
            arrays = {n: inputs[n].numpy() for n in engine.input_names}
            times[precision] = latency(engine, arrays)
            total[precision] += times[precision]
            convs = engine.int8_convolutions()
        row = [f'{times[p] * 1e3:.1f}' for p in ('float', 'int8')]
        table.add_row(
            path.name, *row, f'{times["float"] / times["int8"]:.2f}x', f'{convs[0]}/{convs[1]}'
        )
    row = [f'{total[p] * 1e3:.1f}' for p in ('float', 'int8')]
    table.add_row('all', *row, f'{total["float"] / total["int8"]:.2f}x', '')
    return table


if __name__ == '__main__':
    run_tool(main)
