#!/usr/bin/env python
"""Make a checkpoint ready to hand on: weights and where they come from, nothing else."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from terminal import open_console, run_tool
from torch import Tensor

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.files.checkpoint import CheckpointError, read_checkpoint
from mmdet3d_quant.files.outputs import check_writable, sha256, whole

EXAMPLE = """
examples:
  python tools/publish_checkpoint.py work_dirs/bevfusion/epoch_6.pth --out bevfusion.pth
  python tools/publish_checkpoint.py work_dirs/bevfusion/epoch_6.pth --out bevfusion.pth --half

Leaves the optimizer's state and the logs behind. With --half, weights of convolutions and linear
layers are stored as float16 (batch norm, biases and quantization ranges stay float32); they load
into a float32 model as they are. In the file, tensors of a type lie one behind the other in one
record: with a record each, every tensor would take about 200 bytes more than its numbers.
"""
#: What of mmengine's `meta` says how the weights came about.
KEPT = ('epoch', 'iter', 'seed', 'cfg', 'dataset_meta', 'calibration', 'mmengine_version')
_LARGEST = torch.finfo(torch.float16).max


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('checkpoint', help='checkpoint of a training')
    parser.add_argument('--out', required=True, help='checkpoint to write')
    parser.add_argument('--half', action='store_true', help='weights as float16')
    return parser.parse_args(argv)


def halve(name: str, value: Tensor) -> Tensor:
    """A weight as float16; anything with fewer than two axes, and a quantizer's range, as it is.

    Raises:
        CheckpointError: If float16 cannot hold it.
    """
    if not value.is_floating_point() or value.dim() < 2 or name.endswith('_amax'):
        return value
    if value.abs().max() > _LARGEST:
        raise CheckpointError(f'{name} exceeds {_LARGEST:.0f}, the largest float16: omit --half')
    return value.half()


def packed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors into one piece of memory per type, of which each is a view."""
    found = {}
    for dtype in {value.dtype for value in state.values()}:
        names = [name for name, value in state.items() if value.dtype == dtype]
        memory = torch.cat([state[name].flatten() for name in names])
        pieces = memory.split([state[name].numel() for name in names])
        found.update((n, piece.view(state[n].shape)) for n, piece in strict_zip(names, pieces))
    return {name: found[name] for name in state}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_writable(args.out)
    checkpoint = read_checkpoint(args.checkpoint)
    state = checkpoint['state_dict']
    bad = [name for name, value in state.items() if not value.isfinite().all()]
    if bad:
        raise CheckpointError(f'{args.checkpoint}: {bad[0]} is not finite')
    if args.half:
        state = {name: halve(name, value) for name, value in state.items()}
    meta = {key: checkpoint['meta'][key] for key in KEPT if key in checkpoint['meta']}
    source = Path(args.checkpoint)
    meta['source_checkpoint'] = dict(name=source.name, sha256=sha256(source))
    with whole(args.out) as path:
        torch.save(dict(state_dict=packed(state), meta=meta), path)
    sizes = (Path(p).stat().st_size / 1e6 for p in (source, args.out))
    open_console().print('Wrote {}, {:.1f} MB became {:.1f} MB'.format(args.out, *sizes))


if __name__ == '__main__':
    run_tool(main)
