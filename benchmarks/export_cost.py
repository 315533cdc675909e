#!/usr/bin/env python
"""Time and memory of exporting the whole set of files of the ResNet-50 BEVFusion, in a process.

Weights are random and ranges made up: neither changes the work. The process runs
tools/export_onnx.py from its start to its end, imports and reading the checkpoint included.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

import mmdet3d_quant as mq
from mmdet3d_quant.runs import from_config as fc

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn_int8_nus-3d.py'
EXAMPLE = """
examples:
  python benchmarks/export_cost.py
  python benchmarks/export_cost.py --rounds 3 --options --target openvino --weights int8
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', default=str(CONFIG), help='config with Quant* types')
    parser.add_argument('--rounds', type=int, default=1)
    parser.add_argument(
        '--options', nargs=argparse.REMAINDER, default=[], help='all that follows: for the export'
    )
    return parser.parse_args()


def save_ranged(config: str, path: Path) -> None:
    """A checkpoint of random weights with a range for every quantizer."""
    torch.manual_seed(0)
    model = fc.build_model(fc.read_config(config))
    for module in model.modules():
        if hasattr(module, 'weight_amax'):
            module._weight_quantizer.amax = module.weight_amax()
    for quantizer in mq.quantizers(model).values():
        if quantizer.float_reason is None and not quantizer.calibrated:
            quantizer.amax = 4.0
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)


def cpu_seconds() -> float:
    """What all child processes so far took, which does not depend on the machine's other work."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    args = parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, out = Path(folder) / 'int8.pth', Path(folder) / 'onnx'
        save_ranged(args.config, checkpoint)
        command = [sys.executable, str(ROOT / 'tools/export_onnx.py'), args.config]
        command += [str(checkpoint), '--out-dir', str(out)]
        command += ['--inputs', 'generated', '--no-verify', *args.options]
        for _ in range(args.rounds):
            start, before = time.perf_counter(), cpu_seconds()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
            seconds, work = time.perf_counter() - start, cpu_seconds() - before
            # Of the largest child so far, KiB on Linux.
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            console.print(f'{seconds:.1f} s ({work:.1f} s of a CPU), at most {peak:.2f} GiB')
        for file in sorted(out.iterdir()):
            console.print(f'{file.stat().st_size / 2**20:8.1f} MiB  {file.name}')


if __name__ == '__main__':
    main()
