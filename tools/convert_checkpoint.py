#!/usr/bin/env python
"""Convert a BEVFusion checkpoint of mit-han-lab or CUDA-BEVFusion to mmdet3d's, or back."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from terminal import open_console, run_tool

from mmdet3d_quant.files.checkpoint import read_checkpoint
from mmdet3d_quant.files.outputs import check_writable, whole
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.conversion import TARGETS, Part, convert, fit, rename
from mmdet3d_quant.runs.provenance import provenance

EXAMPLE = """
examples:
  CONFIG=configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn_nus-3d.py

  # CUDA-BEVFusion's float ResNet-50 model, checked against the config, then ready to calibrate
  python tools/convert_checkpoint.py bevfusion-det.pth --out float.pth --config $CONFIG

  # a model trained in mmdet3d, for mit-han-lab's and NVIDIA's scripts
  python tools/convert_checkpoint.py float.pth --out bevfusion-det.pth --to mit --config $CONFIG

Converts names, the layout of sparse weights and the coding of boxes (docs/checkpoints.md); every
weight finds a place, or nothing is written. State of the optimizer is left behind. Ranges of
quantizers come along; with --config, those that the model does not have are left out.

Of a model that was pickled whole the weights are read. NVIDIA's bevfusion_ptq.pth is refused, since
its batch norm is folded away: convert the float checkpoint that it was made from, and calibrate.
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('checkpoint', help='checkpoint to convert')
    parser.add_argument('--out', required=True, help='checkpoint to write')
    parser.add_argument(
        '--to', choices=TARGETS, default='mmdet3d', help='layout to write; default: %(default)s'
    )
    parser.add_argument('--config', help="mmdet3d's config, to check names and shapes against")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    console = open_console()
    check_writable(args.out)
    cfg = fc.read_config(args.config) if args.config else None
    model = fc.build_model(cfg) if cfg else None
    checkpoint = read_checkpoint(args.checkpoint)
    state, parts = convert(checkpoint['state_dict'], args.to)
    left_out: list[str] = []
    if model is not None:
        ours = state if args.to == 'mmdet3d' else convert(state, 'mmdet3d')[0]
        left_out = fit(ours, model)
        for name in left_out:
            del state[name if args.to == 'mmdet3d' else str(rename(name, 'mit'))]

    meta = {
        **checkpoint['meta'],
        **provenance(cfg, args.checkpoint),
        'conversion': dict(to=args.to),
    }
    with whole(args.out) as path:
        torch.save(dict(state_dict=state, meta=meta), path)
    report(parts, left_out, console)
    if model is None:
        console.print('Names and shapes were not checked against a model: give --config for that')
    console.print(f'Wrote {args.out}')


def report(parts: dict[str, Part], left_out: list[str], console: Console) -> None:
    """Prints what was placed per part, and the ranges without a quantizer."""
    table = Table('part', 'entries', 'numbers', 'rearranged entries')
    for name, part in parts.items():
        table.add_row(name, str(part.entries), f'{part.numbers:,}', str(part.changed))
    console.print(table)
    for name in left_out:
        console.print(f'left out: {name}: the model has no such quantizer')
    if left_out:
        console.print(f'{len(left_out)} of these entries, ranges, were left out')


if __name__ == '__main__':
    run_tool(main)
