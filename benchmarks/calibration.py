#!/usr/bin/env python
"""Time and memory of calibrating a ResNet-50 camera branch: float, ours, stock.

Float: the same batches through the same model, nothing observed. Ours: mmdet3d_quant's whole
calibration, search and all. Stock: pytorch-quantization's way, as NVIDIA's CUDA-BEVFusion uses it:
its histogram calibrators, then its own search; its search runs on a CPU here where it would call
`.cuda()`. All three take turns batch by batch, so that the machine's moods hit all alike.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from mmdet3d.registry import MODELS
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import mmdet3d_quant as mq
from mmdet3d_quant.calibration.observe import activation_quantizers
from mmdet3d_quant.engines.memory import peak_memory

EXAMPLE = """
examples:
  python benchmarks/calibration.py
  python benchmarks/calibration.py --batches 8 --size 128 352 --method entropy
"""
BACKBONE = dict(type='QuantResNet', depth=50, out_indices=(1, 2, 3))
NECK = dict(
    type='QuantGeneralizedLSSFPN',
    in_channels=[512, 1024, 2048],
    out_channels=256,
    start_level=0,
    num_outs=3,
    norm_cfg=dict(type='BN2d', requires_grad=False),
    act_cfg=dict(type='ReLU', inplace=True),
    upsample_cfg=dict(mode='bilinear', align_corners=False),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--size', type=int, nargs=2, default=(256, 704), help='height width')
    parser.add_argument('--cameras', type=int, default=6)
    parser.add_argument('--batches', type=int, default=32)
    parser.add_argument('--stock-batches', type=int, default=4, help='the stock way is slow')
    parser.add_argument('--method', default='mse', help='default: %(default)s')
    parser.add_argument('--memory', type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def branch() -> nn.Module:
    """Backbone and neck, with batch norm statistics of random images."""
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(img_backbone=MODELS.build(BACKBONE), img_neck=MODELS.build(NECK)))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    with torch.no_grad(), mq.set_mode(model, 'float'):
        for image in images(4, 2, (128, 352)):
            forward(model, image)
    model.eval()
    return model


def images(count: int, cameras: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """Random images, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(cameras, 3, *size, generator=generator)


def forward(model: nn.Module, x: Tensor) -> Tensor:
    """Images to features."""
    return model['img_neck'](model['img_backbone'](x))


def stock(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Puts stock quantizers with histogram calibrators in the place of ours."""
    found = {}
    for name in activation_quantizers(model):
        parent, _, attribute = name.rpartition('.')
        quantizer = TensorQuantizer(QuantDescriptor(num_bits=8, calib_method='histogram'))
        quantizer.disable_quant()
        quantizer.enable_calib()
        setattr(model.get_submodule(parent), attribute, quantizer)
        found[name] = quantizer
    return found


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the time of a block."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def compare(args: argparse.Namespace, console: Console) -> None:
    """Float, ours and stock, in turns."""
    plain, ours, theirs = branch(), branch(), branch()
    mq.set_mode(plain, 'float')
    quantizers = stock(theirs)
    mq.set_mode(theirs, 'float')  # the weights' quantizers, which are still ours
    calibrator = mq.Calibrator(ours, mq.Plan.parse(args.method), forward)
    seconds: dict[str, float] = {}
    first: dict[str, float] = {}
    data = images(args.batches, args.cameras, tuple(args.size))
    with torch.no_grad():
        forward(plain, torch.randn(args.cameras, 3, *args.size))  # warm
        for i, x in enumerate(track(data, 'Batches', total=args.batches, console=console)):
            with timed(seconds, 'float'):
                forward(plain, x)
            with timed(seconds, 'ours'):
                list(calibrator.observe([(i, x)]))
            if calibrator.stability.due(i + 1):
                with timed(seconds, 'search'):
                    calibrator.look()
            if i < args.stock_batches:
                with timed(first, 'stock'):
                    forward(theirs, x)
                first['float'] = seconds['float']
    with timed(seconds, 'search'):
        calibrator.finish()
    name, _, percentile = args.method.partition(':')
    options = dict(percentile=float(percentile or 99.99)) if name == 'percentile' else {}
    with patch.object(Tensor, 'cuda', lambda self: self):
        searched = list(quantizers.values()) if args.stock_batches else []
        for quantizer in track(searched, 'Stock search', console=console):
            with timed(first, 'search'):
                quantizer._calibrator.compute_amax(name, **options)
    report(args, console, seconds, first, len(quantizers))


def report(args, console, seconds, first, count) -> None:
    """The table."""
    each = seconds['float'] / args.batches
    total = seconds['ours'] + seconds['search']
    table = Table('', 'observing, s', 'search, s', 'all, s', 'times float')
    table.add_row('float forward', f'{seconds["float"]:.1f}', '', f'{seconds["float"]:.1f}', '1.00')
    rows = [('ours', seconds['ours'], seconds['search'])]
    if args.stock_batches:
        observing = first['stock'] * seconds['float'] / first['float']
        rows.append(('stock', observing, first['search']))
    for name, observed, searched in rows:
        cells = (f'{t:.2f}' for t in (observed, searched, observed + searched))
        table.add_row(name, *cells, f'{(observed + searched) / seconds["float"]:.2f}')
    console.print(table)
    console.print(
        f'{count} activation quantizers, {args.method}, {args.batches} batches of '
        f'{args.cameras}x3x{args.size[0]}x{args.size[1]}, {each:.2f} s a float forward, '
        f'{torch.get_num_threads()} threads. Ours: {total / seconds["float"]:.3f} times float. '
        f'Stock: observing measured on {args.stock_batches} batches, scaled.'
    )


def memory(console: Console) -> None:
    """Peak memory of whole processes with few and with many batches."""
    table = Table('batches of 1x3x128x352', 'peak memory, MiB')
    for count in (32, 128):
        command = [sys.executable, __file__, '--memory', str(count)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        table.add_row(str(count), found.stdout.split()[-1])
    console.print(table)


def main() -> None:
    args = parse_args()
    if args.memory:
        mq.calibrate(branch(), images(args.memory, 1, (128, 352)), forward=forward)
        print(peak_memory() // 2**20)
        return
    console = Console()
    compare(args, console)
    memory(console)


if __name__ == '__main__':
    main()
