#!/usr/bin/env python
"""Read a LiDAR encoder that was exported for libspconv, show its layers and run it in torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from terminal import open_console, run_tool
from torch import Tensor

from mmdet3d_quant.core.compat import removeprefix
from mmdet3d_quant.export.sparse import Program, ScnError, read_program
from mmdet3d_quant.export.sparse.program import Add, SparseConv, conflicts
from mmdet3d_quant.export.sparse.run import ScnNetwork
from mmdet3d_quant.files.outputs import check_writable, whole

EXAMPLE = """
examples:
  python tools/check_scn.py onnx/int8/lidar.backbone.xyz.onnx
  python tools/check_scn.py lidar.backbone.xyz.onnx --points LIDAR_TOP.bin

  # another grid than 108 m x 108 m x 8 m
  python tools/check_scn.py lidar.backbone.xyz.onnx --points LIDAR_TOP.bin \\
      --range -36 -36 -5 36 36 3 --voxel-size 0.25 0.25 0.25

exit code: 0 it runs, 1 numbers leave FP16's range or a layer has more voxels than its output_bound,
2 the file or the points cannot be read
"""
#: CUDA-BEVFusion's.
RANGE, VOXEL_SIZE = [-54.0, -54.0, -5.0, 54.0, 54.0, 3.0], [0.075, 0.075, 0.2]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('file', metavar='FILE', help='ONNX file, of this package or of NVIDIA')
    parser.add_argument(
        '--points',
        type=Path,
        metavar='BIN',
        help='points, float32, as many columns as a voxel has channels, x, y, z first; by default '
        'voxels are generated',
    )
    parser.add_argument(
        '--range',
        nargs=6,
        type=float,
        default=RANGE,
        metavar='METRES',
        help='of the grid, lower corner first; default: %(default)s',
    )
    parser.add_argument(
        '--voxel-size',
        nargs=3,
        type=float,
        default=VOXEL_SIZE,
        metavar='METRES',
        help='along x, y and z; default: %(default)s',
    )
    parser.add_argument('--save', type=Path, metavar='NPY', help='write the map here, float32')
    parser.add_argument('--json', action='store_true', help='print the layers as JSON')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    console = open_console()
    if args.save:
        check_writable(args.save)
    program = read_program(args.file)
    if args.json:
        console.print_json(json.dumps([vars_of(op) for op in layers(program)]))
    else:
        console.print(layer_table(program))
    for tensor, ranges in conflicts(program).items():
        console.print(
            f'tensor {tensor} is read with unequal ranges ({", ".join(f"{r:g}" for r in ranges)}), '
            'and libspconv knows one per tensor; here each reader takes its own'
        )
    feats, coors = read_points(program, args) if args.points else generated(program)
    console.print(f'Running on {len(feats):,} voxels, tensors in FP16 as libspconv keeps them')
    network = ScnNetwork(program, fp16_tensors=True)
    dense = network(feats, coors)
    describe(dense, console)
    crowded = describe_voxels(network, console)
    if args.save:
        with whole(args.save) as part, open(part, 'wb') as file:
            np.save(file, dense.numpy())
    return 1 if crowded or not bool(torch.isfinite(dense).all()) else 0


def layers(program: Program) -> list[SparseConv | Add]:
    """Lists the operators that compute: convolutions and adds."""
    return [op for op in program.ops if isinstance(op, (SparseConv, Add))]


def vars_of(op: SparseConv | Add) -> dict:
    """Fields of a layer that are not weights."""
    plain = {n: v for n, v in vars(op).items() if not isinstance(v, Tensor)}
    if isinstance(op, SparseConv):
        plain['kernel'] = op.kernel
    return plain


def layer_table(program: Program) -> Table:
    """One row per layer."""
    grid = ' x '.join(map(str, program.grid))
    table = Table(title=f'{program.order}, {grid} cells, to {program.output_shape}')
    for name in ('node', 'layer', 'kernel', 'stride', 'channels', 'rules', 'precision', 'range'):
        table.add_column(name)
    for op in layers(program):
        if isinstance(op, SparseConv):
            limit = op.input_range
            shape = [
                'x'.join(map(str, op.kernel)),
                'x'.join(map(str, op.stride)),
                f'{op.weight.shape[-1]} -> {op.weight.shape[0]}{", ReLU" if op.relu else ""}',
                op.rulebook,
            ]
        else:
            limit = op.ranges[0]
            shape = [''] * 4
        precision = f'{op.precision} -> {op.output_precision}'
        shown = '' if limit is None else f'{limit:.4g}'
        table.add_row(op.name, removeprefix(op.layer, 'encoder_layers.'), *shape, precision, shown)
    return table


def read_points(program: Program, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Means of the points of each cell, and the cells in the order of the file.

    Raises:
        ScnError: If the file does not have as many columns, or no point is inside.
    """
    values = np.fromfile(args.points, np.float32)
    if values.size % program.channels:
        raise ScnError(f'{args.points} has {values.size} numbers, no multiple of '
                       f'{program.channels}, the channels of a voxel')  # fmt: skip
    points = values.reshape(-1, program.channels)
    low, high = np.split(np.array(args.range, np.float32), 2)
    points = points[((points[:, :3] >= low) & (points[:, :3] < high)).all(1)]
    if not len(points):
        raise ScnError(f'{args.points} has no point inside of {args.range}')
    cells = ((points[:, :3] - low) / np.array(args.voxel_size, np.float32)).astype(np.int64)
    cells, which, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    sums = np.zeros((len(cells), program.channels))
    np.add.at(sums, which.ravel(), points)
    if program.order == 'zyx':
        cells = cells[:, ::-1]
    coors = np.pad(cells, ((0, 0), (1, 0)))
    feats = (sums / counts[:, None]).astype(np.float32)
    return torch.from_numpy(feats), torch.from_numpy(coors)


def generated(program: Program, count: int = 20_000) -> tuple[Tensor, Tensor]:
    """Random voxels, normally distributed."""
    rng = torch.Generator().manual_seed(0)
    coors = [torch.randint(0, n, (count,), generator=rng) for n in (1, *program.grid)]
    cells = torch.stack(coors, 1).unique(dim=0)
    return torch.randn(len(cells), program.channels, generator=rng), cells


def describe(dense: Tensor, console: Console) -> None:
    """Prints shape, share of zeros and statistics of a map."""
    console.print(
        f'Map {tuple(dense.shape)}: {float((dense != 0).float().mean()):.1%} not zero, '
        f'from {float(dense.min()):.4g} to {float(dense.max()):.4g}, '
        f'standard deviation {float(dense.std()):.4g}'
    )
    odd = int((~torch.isfinite(dense)).sum())
    if odd:
        console.print(f'[red]{odd:,} values are not finite: FP16 ends at 65504')


def describe_voxels(network: ScnNetwork, console: Console) -> bool:
    """Prints which layer comes closest to its bound; returns whether one is beyond."""
    if not network.voxels:
        return False
    bounds = {op.name: op.output_bound for op in network.program.convs}
    name, count = max(network.voxels.items(), key=lambda item: item[1] / bounds[item[0]])
    console.print(f'Fullest: {name}, {count:,} voxels of its output_bound of {bounds[name]:,}')
    crowded = network.crowded()
    for line in crowded:
        console.print(f'[red]{line}')
    return bool(crowded)


if __name__ == '__main__':
    run_tool(main, failure=2)
