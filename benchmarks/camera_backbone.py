#!/usr/bin/env python
"""INT8 against float latency of a ResNet-50 in OpenVINO, in one run; the ratio is the result."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from mmdet3d.registry import MODELS
from rich.console import Console
from rich.table import Table

import mmdet3d_quant as mq
from mmdet3d_quant.engines import OpenVINO, latency
from mmdet3d_quant.export import export_onnx

EXAMPLE = """
example:
  python benchmarks/camera_backbone.py --rounds 5 --size 256 704
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--size', type=int, nargs=2, default=(256, 704), help='height width')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=5, help='float and INT8 take turns')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    model = MODELS.build(dict(type='QuantResNet', depth=50, out_indices=(1, 2, 3)))
    model.eval()
    image = torch.randn(1, 3, *args.size)
    mq.calibrate(model, [image], 'mse')
    with tempfile.TemporaryDirectory() as folder:
        engines = {}
        for name, quantized in (('float', False), ('INT8', True)):
            path = Path(folder) / f'{name}.onnx'
            outputs = ('c3', 'c4', 'c5')
            export_onnx(model, [image], path, ['img'], outputs, quantized=quantized)
            engines[name] = OpenVINO(path, args.threads)
        arrays = {'img': image.numpy()}
        times: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(args.rounds):
            for name, engine in engines.items():
                times[name].append(latency(engine, arrays, runs=15))
    ratios = np.array(times['float']) / np.array(times['INT8'])
    table = Table('precision', 'median ms', 'spread ms', 'INT8 convs')
    for name, values in times.items():
        ms = np.array(values) * 1e3
        convs = '{} of {}'.format(*engines[name].int8_convolutions())
        table.add_row(name, f'{np.median(ms):.1f}', f'{ms.min():.1f} - {ms.max():.1f}', convs)
    console = Console()
    console.print(table)
    console.print(
        f'INT8 is {np.median(ratios):.2f}x faster than float '
        f'({ratios.min():.2f} - {ratios.max():.2f} over {args.rounds} rounds), '
        f'1x3x{args.size[0]}x{args.size[1]}, {args.threads} threads'
    )


if __name__ == '__main__':
    main()
