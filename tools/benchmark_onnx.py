#!/usr/bin/env python
"""Compare ONNX files by speed, closeness to float, memory and size, also with NNCF's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from terminal import ConsoleListener, open_console, run_tool

from mmdet3d_quant.check.benchmark import Results, benchmark, benchmark_facts, sum_up
from mmdet3d_quant.check.compare import Variant
from mmdet3d_quant.check.nncf import PEER, Nncf
from mmdet3d_quant.check.variants import find_graphs
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines import ENGINES
from mmdet3d_quant.files.outputs import check_writable, whole

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = """
examples:
  # two files, or folders with files of the same names; the first is the float one
  python tools/benchmark_onnx.py onnx/float/fuser.onnx onnx/int8/fuser.onnx
  python tools/benchmark_onnx.py onnx/float onnx/int8 onnx/openvino --runs 30 --json speed.json

  # also what NNCF makes of the float graph, from an environment of its own:
  python3 -m venv /tmp/nncf-venv && /tmp/nncf-venv/bin/pip install nncf openvino onnx
  python tools/benchmark_onnx.py onnx/float onnx/int8 --nncf-python /tmp/nncf-venv/bin/python

Engines take turns, run by run, so ratios hold on a busy machine too; times do not.
Without --inputs they are random: closeness then says little about a trained model.
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('float', type=Path, metavar='FLOAT', help='float ONNX file or folder')
    parser.add_argument(
        'others', type=Path, nargs='+', metavar='INT8', help='quantized ones, of the same graphs'
    )
    parser.add_argument('--engine', choices=ENGINES, default='openvino', help='default: openvino')
    parser.add_argument('--threads', type=int, default=2, help='default: %(default)s')
    parser.add_argument('--runs', type=int, default=30, help='rounds; default: %(default)s')
    parser.add_argument(
        '--inputs', type=Path, help='.npz with inputs by name, samples along a new first axis'
    )
    parser.add_argument('--samples', type=int, default=2, help='random ones, without --inputs')
    parser.add_argument('--nncf-python', help='Python with nncf, openvino and onnx')
    parser.add_argument(
        '--nncf-inputs', type=Path, help='.npz that NNCF calibrates on; default: the inputs'
    )
    parser.add_argument('--no-memory', action='store_true', help='start no processes for memory')
    parser.add_argument('--json', type=Path, help='write all numbers here')
    parser.add_argument('--picture', type=Path, help='draw the times as a PNG')
    args = parser.parse_args(argv)
    for name in ('threads', 'runs', 'samples'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1, not {getattr(args, name)}')
    if args.nncf_python and args.engine != 'openvino':
        parser.error('--nncf-python makes an OpenVINO model: it needs --engine openvino')
    return args


def main(argv: list[str] | None = None) -> Results:
    args = parse_args(argv)
    console = open_console()
    for path in (args.json, args.picture):
        if path is not None:
            check_writable(path)
    graphs = find_graphs([args.float, *args.others])
    nncf = Nncf(args.nncf_python, ROOT / 'tools/nncf_peer.py') if args.nncf_python else None
    results = {}
    for name, variants in benchmark(
        graphs,
        args.engine,
        args.threads,
        args.runs,
        inputs=args.inputs,
        num_samples=args.samples,
        memory=not args.no_memory,
        nncf=nncf,
        nncf_inputs=args.nncf_inputs,
        listener=ConsoleListener(console, transient=True),
    ):
        results[name] = variants
        console.print(table(name, variants))
    if len(results) > 1:
        console.print(table('whole set, one file after the other', sum_up(results)))
    console.print(
        f'{args.engine}, {args.threads} threads, {args.runs} rounds in turn; ms: median '
        '(quartiles); faster: median of the rounds (quartiles)',
        highlight=False,
    )
    if args.json:
        facts = benchmark_facts(results, args.engine, args.threads)
        with whole(args.json) as part:
            Path(part).write_text(json.dumps(facts, indent=1))
        console.print(f'Wrote {args.json}')
    if args.picture:
        with whole(args.picture) as part:
            draw(results).savefig(part, format='png', dpi=120)
        console.print(f'Wrote {args.picture}')
    return results


def table(name: str, variants: list[Variant]) -> Table:
    """One graph, a row per variant."""
    result = Table(title=name, title_justify='left')
    peer = next((v for v in variants if v.name == PEER), None)
    columns = ['file', 'ms', 'faster than float', f'than {PEER}', 'SQNR dB', 'INT8 convs', 'MB']
    for column in [*columns, 'MB in memory']:
        if column != f'than {PEER}' or peer:
            result.add_column(column, justify='left' if column == 'file' else 'right')
    for v in variants:
        row = [v.name, spread(v.milliseconds, '.1f')]
        row.append('' if v is variants[0] else spread(v.faster_than(variants[0]), '.2f'))
        if peer:
            row.append('' if v is peer else spread(v.faster_than(peer), '.3f'))
        row.append('' if v is variants[0] else ' '.join(f'{x:.1f}' for x in v.sqnr.values()))
        row.append('{} of {}'.format(*v.int8) if v.int8 else '')
        row.append(f'{v.megabytes:.1f}')
        row.append('' if v.memory is None else f'{v.memory:.0f}')
        result.add_row(*row)
    return result


def spread(values: tuple[float, float, float], form: str) -> str:
    middle, low, high = (format(v, form) for v in values)
    return f'{middle} ({low}-{high})'


def draw(results: Results) -> Figure:
    """Times of every graph, a box per variant."""
    figure = Figure(figsize=(4 * len(results), 3.5), layout='constrained')
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for ax, (name, variants) in strict_zip(axes, results.items()):
        ax.boxplot([np.array(v.seconds) * 1e3 for v in variants], showfliers=False)
        ax.set_xticks(range(1, len(variants) + 1), [v.name for v in variants], rotation=20)
        ax.set_title(name, fontsize='medium')
        ax.set_ylim(0)
        ax.grid(axis='y', alpha=0.3)
    axes[0].set_ylabel('ms per run')
    return figure


if __name__ == '__main__':
    run_tool(main)
