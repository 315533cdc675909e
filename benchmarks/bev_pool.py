#!/usr/bin/env python
"""Time and peak memory of BEV pooling, against outer product and index_add.

Both against the bytes that must move in any case: every input read once, and the result, or every
gradient, written once. On a GPU that is what there is to wait for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mmdet3d_quant.engines.memory import peak_memory
from mmdet3d_quant.parents.bev_pool import bev_pool
from mmdet3d_quant.parents.view_transform import LSSTransform

EXAMPLE = """
examples:
  python benchmarks/bev_pool.py --cams 6 --rounds 5
  python benchmarks/bev_pool.py --device cuda --rounds 50

Each way runs in a process of its own, so that its peak memory can be read.
"""


def obvious(context: torch.Tensor, depth: torch.Tensor, cells: torch.Tensor, num_cells: int):
    """Stores depth x context of every bin, then adds it to its cell."""
    product = depth[:, :, None] * context[:, None]  # (M, D, C, H, W)
    rows = product.permute(0, 1, 3, 4, 2).reshape(-1, context.shape[1])
    flat = cells.flatten()
    inside = (flat >= 0) & (flat < num_cells)
    out = context.new_zeros(num_cells, context.shape[1])
    return out.index_add_(0, flat[inside], rows[inside])


WAYS = {'outer product + index_add': obvious, 'bev_pool': bev_pool}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--cams', type=int, default=6)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--device', default='cpu', help='cpu or cuda; default: %(default)s')
    parser.add_argument('--way', choices=list(WAYS), help='measure one, print JSON (internal)')
    return parser.parse_args()


def problem(cams: int):
    """Features at 32x88, 118 depth bins, cells of cameras that look around evenly."""
    torch.manual_seed(0)
    view = LSSTransform(
        256, 80, [256, 704], [32, 88], [-54.0, 54.0, 0.3], [-54.0, 54.0, 0.3],
        [-10.0, 10.0, 20.0], [1.0, 60.0, 0.5],
    )  # fmt: skip
    yaw = torch.arange(cams) * (2 * np.pi / cams)
    zero, one = torch.zeros(cams), torch.ones(cams)
    ahead = torch.stack([-yaw.sin(), yaw.cos(), zero], -1)
    right = torch.stack([yaw.cos(), yaw.sin(), zero], -1)
    down = torch.stack([zero, zero, -one], -1)
    rotation = torch.stack([right, down, ahead], -1)[None]
    intrinsics = torch.tensor([[604.0, 0, 352], [0, 604, 128], [0, 0, 1]]).expand(1, cams, 3, 3)
    eye, origin = torch.eye(3).expand(1, cams, 3, 3), torch.zeros(1, cams, 3)
    geometry = view.get_geometry(rotation, origin, intrinsics, eye, origin)
    index = ((geometry - (view.bx - view.dx / 2)) / view.dx).long()
    inside = ((index >= 0) & (index < view.nx)).all(-1)
    cells = (index[..., 0] * 360 + index[..., 1]).masked_fill(~inside, -1)[0]
    context = torch.randn(cams, 80, 32, 88, requires_grad=True)
    depth = torch.randn(cams, 118, 32, 88).softmax(1).requires_grad_()
    return context, depth, cells, 360 * 360


def measure(way: str, args: argparse.Namespace) -> dict:
    """Median seconds and peak memory above the inputs', MiB; a checksum of the result."""
    torch.set_num_threads(args.threads)
    *tensors, num_cells = problem(args.cams)
    context, depth, cells = (t.detach().to(args.device) for t in tensors)
    inputs = context.requires_grad_(), depth.requires_grad_(), cells, num_cells
    cuda = context.is_cuda
    read_peak = torch.cuda.max_memory_allocated if cuda else peak_memory
    before = read_peak()
    pool, times = WAYS[way], {'forward': [], 'backward': []}
    peaks = {}
    for name in times:
        for _ in range(args.rounds + cuda):
            start = time.perf_counter()
            with torch.set_grad_enabled(name == 'backward'):
                out = pool(*inputs)
            if name == 'backward':
                out.square().sum().backward()
            if cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
        peaks[name] = (read_peak() - before) / 2**20
    medians = {n: float(np.median(t[cuda:])) for n, t in times.items()}  # on a GPU the first loads
    size = {t: t.numel() * t.element_size() for t in (*inputs[:3], out)}
    least = sum(size.values())
    both = 2 * sum(size[t] for t in inputs[:2]) + least + size[cells] + size[out]
    return dict(
        seconds=medians,
        peak=peaks,
        norm=float(out.detach().double().norm()),
        bytes=dict(forward=least, backward=both),
    )


def main() -> None:
    args = parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args)))
        return
    results = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], '--way', way]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        results[way] = json.loads(output.splitlines()[-1])
    norms = [r['norm'] for r in results.values()]
    assert abs(norms[0] - norms[1]) < 1e-5 * norms[0], f'results differ: {norms}'
    table = Table('way', 'forward s', 'forward + backward s', 'peak MiB', 'peak with backward')
    for way, r in results.items():
        row = [f'{r["seconds"][n]:.4f}' for n in ('forward', 'backward')]
        table.add_row(way, *row, *(f'{r["peak"][n]:.0f}' for n in ('forward', 'backward')))
    ours, theirs = results['bev_pool'], results['outer product + index_add']
    console = Console()
    console.print(table)
    console.print(
        'bev_pool against the obvious way: '
        + ', '.join(
            f'{name} {theirs["seconds"][name] / ours["seconds"][name]:.1f}x faster with '
            f'{theirs["peak"][name] / ours["peak"][name]:.1f}x less memory'
            for name in ('forward', 'backward')
        )
        + f' ({args.cams} x 118 x 32 x 88 x 80, {args.device})'
    )
    for name, size in ours['bytes'].items():
        rate = size / ours['seconds'][name] / 1e9
        console.print(f'{name}: {size / 1e6:.0f} MB must move, {rate:.1f} GB/s of them')


if __name__ == '__main__':
    main()
