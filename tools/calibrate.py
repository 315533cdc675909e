#!/usr/bin/env python
"""Calibrate a quantized model: find the INT8 range of every layer from a few batches of data."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from mmengine.config import DictAction
from rich.console import Console
from rich.progress import track
from rich.table import Table
from terminal import open_console

import mmdet3d_quant as mq
from mmdet3d_quant import from_config as fc
from mmdet3d_quant.files import CheckpointError, check_writable, whole
from mmdet3d_quant.histogram import NonFiniteError
from mmdet3d_quant.provenance import provenance
from mmdet3d_quant.spec import Method

EXAMPLE = """
examples:
  CONFIG=configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn_int8_nus-3d.py

  # 128 batches of the config's calib_dataloader (or val_dataloader), method mse
  python tools/calibrate.py $CONFIG float.pth --out int8.pth --num-batches 128

  # keep the first convolution float
  python tools/calibrate.py $CONFIG float.pth --out int8.pth \\
      --cfg-options model.img_backbone.skip="['conv1']"

The output is an ordinary checkpoint: mmdet3d's init_model and tools/test.py load it.
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config with Quant* types')
    parser.add_argument('checkpoint', help='float checkpoint')
    parser.add_argument('--out', required=True, help='checkpoint to write')
    parser.add_argument('--num-batches', type=int, help='batches to use; default: all')
    parser.add_argument(
        '--method',
        default='mse',
        help='max, percentile[:99.99], entropy or mse; default: %(default)s',
    )
    parser.add_argument('--device', help='cpu or cuda[:N]; default: a GPU where there is one')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE overrides of the config'
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    console = open_console()
    method = Method.parse(args.method)
    if args.num_batches is not None and args.num_batches < 1:
        raise ValueError(f'--num-batches must be at least 1, got {args.num_batches}')
    check_writable(args.out)
    cfg = fc.read_config(args.config, args.cfg_options)
    device = fc.pick_device(args.device)
    model = fc.build_model(cfg)
    meta = fc.load_weights(model, args.checkpoint, calibrated=False)
    loader_name, loader = fc.build_calibration_loader(cfg)

    count = min(args.num_batches or len(loader), len(loader))
    console.print(f'Calibrating on {count} of {len(loader)} batches of {loader_name}, {device}')
    batches = track(loader, 'Observing', total=count, console=console)
    result = mq.calibrate(model.to(device), batches, method, num_batches=count)

    meta.update(provenance(cfg, args.checkpoint))
    meta['calibration'] = dict(
        method=result.method, num_batches=result.num_batches, loader=loader_name
    )
    with whole(args.out) as path:
        torch.save(dict(state_dict=model.cpu().state_dict(), meta=meta), path)
    report(result, console)
    console.print(f'Wrote {args.out}')


def report(result: mq.Calibration, console: Console) -> None:
    """Prints what was calibrated, what shares a scale and what stays float."""
    table = Table('activation quantizer', 'amax', 'largest', 'clipped to', 'values', 'group')
    for r in result.ranges:
        share = f'{r.amax / r.largest:.1%}' if r.largest else 'all zero'
        group = '' if r.group is None else str(r.group)
        cells: list[Any] = [r.name, f'{r.amax:.4g}', f'{r.largest:.4g}', share, r.num_elements]
        table.add_row(*map(str, cells), group)
    console.print(table)
    groups = Table('group', 'quantizers that share one scale')
    for i, group in enumerate(result.groups):
        groups.add_row(str(i), '\n'.join(group))
    console.print(groups)
    for name, reason in result.kept_float.items():
        console.print(f'float: {name} ({reason})')
    console.print(
        f'{len(result.ranges)} activation and {result.num_weights} weight quantizers, '
        f'{len(result.groups)} groups, {len(result.kept_float)} kept float, '
        f'method {result.method}, {result.num_batches} batches'
    )


if __name__ == '__main__':
    try:
        main()
    except (
        CheckpointError,
        fc.ConfigError,
        mq.CalibrationError,
        NonFiniteError,
        OSError,
        ValueError,
    ) as err:
        sys.exit(f'error: {err}')
