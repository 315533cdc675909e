#!/usr/bin/env python
"""Write the INT8 config of any float config, and the QAT config beside it."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table
from terminal import open_console, run_tool

from mmdet3d_quant.jobs.child_configs import Written, quantize_config

EXAMPLE = r"""
examples:
  # one of mmdet3d's own, from its wheel
  python tools/quantize_config.py \
      mmdet3d::pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py -o int8.py

  python tools/quantize_config.py configs/fcos3d/fcos3d_r101.py -o configs/fcos3d/fcos3d_int8.py

The INT8 config inherits all but the types of parts, or their conv_cfg, and says in comments what
stays float and why. Weights are not needed: the model is built with random ones, on the CPU.

exit code: 0; 1 with a line that says why
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='float config; mmdet3d::... names one of mmdet3d')
    parser.add_argument(
        '-o', '--out', help='INT8 config to write; default: STEM_int8.py in this folder'
    )
    parser.add_argument('--force', action='store_true', help='replace configs that are there')
    return parser.parse_args(argv)


def tell(console: Console, written: Written) -> None:
    """What became of each part."""
    table = Table('part', 'type', 'layers', 'becomes')
    for swap in written.swaps:
        became = swap.change.get('type', 'conv_cfg=QuantConv2d') if swap.change else 'float'
        table.add_row(swap.part, swap.kind, f'{swap.quantized} of {swap.layers}', became)
    console.print(table)
    layers = written.coverage
    console.print(f'{len(layers.quantized)} of {len(layers.layers)} layers quantized')
    for swap in written.swaps:
        if swap.reason:
            console.print(f'float: {swap.part}: {swap.reason}', markup=False)
    console.print(f'Wrote {written.int8} and {written.qat}')


def main(argv: list[str] | None = None) -> Written:
    args = parse_args(argv)
    console = open_console()
    written = quantize_config(args.config, args.out, args.force)
    tell(console, written)
    return written


if __name__ == '__main__':
    run_tool(main)
