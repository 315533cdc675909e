#!/usr/bin/env python
"""Speed, closeness to float, memory and size of ONNX files side by side, and against NNCF's."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from terminal import open_console, run_tool

from mmdet3d_quant.check.compare import Variant, compare, first_of, generate_samples
from mmdet3d_quant.core.compat import removesuffix, strict_zip
from mmdet3d_quant.engines import ENGINES, Arrays, EngineError, make_engine
from mmdet3d_quant.engines.memory import added_memory
from mmdet3d_quant.export.deploy import engine_files
from mmdet3d_quant.files.outputs import check_writable, whole

ROOT = Path(__file__).resolve().parents[1]
PEER = 'NNCF'
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


def main(argv: list[str] | None = None) -> dict[str, list[Variant]]:
    args = parse_args(argv)
    console = open_console()
    for path in (args.json, args.picture):
        if path is not None:
            check_writable(path)
    graphs = find_graphs([args.float, *args.others])
    if args.nncf_python:
        check_peer(args.nncf_python)
    stored = read_arrays(args.inputs) if args.inputs else None
    calibration = read_arrays(args.nncf_inputs) if args.nncf_inputs else None
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, files in graphs.items():
            shapes = make_engine(args.engine, next(iter(files.values())), args.threads).input_shapes
            samples = pick(stored, shapes, args.inputs) if stored else None
            if samples is None:
                samples = generate_samples(shapes, args.samples)
            if args.nncf_python:
                console.print(f'NNCF quantizes {name}')
                own = pick(calibration, shapes, args.nncf_inputs) if calibration else samples
                peer = Path(folder) / f'{Path(name).stem}.xml'
                quantize_peer(args.nncf_python, next(iter(files.values())), own, peer)
                files[PEER] = peer
            results[name] = run(name, files, samples, Path(folder), args, console)
            console.print(table(name, results[name]))
    if len(results) > 1:
        console.print(table('whole set, one file after the other', sum_up(results)))
    console.print(
        f'{args.engine}, {args.threads} threads, {args.runs} rounds in turn; ms: median '
        '(quartiles); faster: median of the rounds (quartiles)',
        highlight=False,
    )
    if args.json:
        with whole(args.json) as part:
            Path(part).write_text(json.dumps(report(results, args), indent=1))
        console.print(f'Wrote {args.json}')
    if args.picture:
        with whole(args.picture) as part:
            draw(results).savefig(part, format='png', dpi=120)
        console.print(f'Wrote {args.picture}')
    return results


def find_graphs(paths: list[Path]) -> dict[str, dict[str, Path]]:
    """Variants of every graph: file by the name of the variant, by the name of the graph.

    Raises:
        EngineError: If a path does not exist, files and folders are mixed, or no names are shared.
    """
    for path in paths:
        if not path.exists():
            raise EngineError(f'{path} does not exist')
    if len({path.is_dir() for path in paths}) > 1:
        raise EngineError('name files only, or folders only')
    names = labels(paths)
    if not paths[0].is_dir():
        return {paths[0].name: dict(strict_zip(names, paths))}
    shared = set.intersection(*({file.name for file in graph_files(path)} for path in paths))
    if not shared:
        raise EngineError(f'{", ".join(map(str, paths))} share no ONNX file of one name')
    return {
        name: {n: path / name for n, path in strict_zip(names, paths)} for name in sorted(shared)
    }


def graph_files(folder: Path) -> list[Path]:
    """The files that engines run: of an exported set, all but the LiDAR encoder's."""
    if (folder / 'manifest.json').is_file():
        return engine_files(folder)
    return list(folder.glob('*.onnx'))


def labels(paths: list[Path]) -> list[str]:
    """Short names: the part of each path, from the end, that tells it from the others."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ['/'.join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return [removesuffix(name, '.onnx') for name in names]
    raise EngineError(f'{paths[0]} is named twice')


def read_arrays(path: Path) -> Arrays:
    """Arrays of a .npz file.

    Raises:
        EngineError: If it cannot be read.
    """
    try:
        with np.load(path) as stored:
            return dict(stored)
    except Exception as err:  # numpy and zipfile have several
        raise EngineError(f'{path} cannot be read as .npz: {err}') from err


def pick(stored: Arrays, shapes: dict[str, tuple], path: Path) -> Arrays:
    """The arrays that a graph takes."""
    missing = [name for name in shapes if name not in stored]
    if missing:
        raise EngineError(f'{path} has no {missing[0]!r}, it has {", ".join(stored)}')
    return {name: stored[name] for name in shapes}


def check_peer(python: str) -> None:
    """Makes sure, before long work, that NNCF is there."""
    try:
        done = subprocess.run(
            [python, '-c', 'import nncf, openvino, onnx'], capture_output=True, text=True
        )
        problem = done.stderr.strip().splitlines()[-1] if done.returncode else None
    except OSError as err:
        problem = str(err)
    if problem:
        raise EngineError(
            f'--nncf-python {python}: {problem}; make it with `python3 -m venv DIR && '
            'DIR/bin/pip install nncf openvino onnx`'
        )


def quantize_peer(python: str, graph: Path, samples: Arrays, out: Path) -> None:
    """Lets NNCF quantize a float file."""
    inputs = out.with_suffix('.npz')
    np.savez(inputs, **samples)
    command = [python, ROOT / 'tools/nncf_peer.py', graph, inputs, out]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f'NNCF could not quantize {graph}: {done.stderr.strip()[-500:]}')


def run(
    name: str,
    files: dict[str, Path],
    samples: Arrays,
    folder: Path,
    args: argparse.Namespace,
    console: Console,
) -> list[Variant]:
    """Measures the variants of one graph."""
    first = folder / 'first.npz'
    np.savez(first, **first_of(samples))

    def memory(variant: str) -> float:
        return added_memory(args.engine, files[variant], first, args.threads)

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(name, total=args.runs)
        return compare(
            files,
            args.engine,
            args.threads,
            samples,
            args.runs,
            None if args.no_memory else memory,
            lambda: progress.advance(task),
        )


def sum_up(results: dict[str, list[Variant]]) -> list[Variant]:
    """All graphs in a row, by variant: times of equal rounds added."""
    return [
        Variant(
            name=variants[0].name,
            seconds=[sum(seconds) for seconds in strict_zip(*(v.seconds for v in variants))],
            sqnr={},
            megabytes=sum(v.megabytes for v in variants),
            int8=_added([v.int8 for v in variants]),
            memory=None,
        )
        for variants in strict_zip(*results.values())
    ]


def _added(counts: list[tuple[int, int] | None]) -> tuple[int, int] | None:
    known = [count for count in counts if count]
    return (sum(c[0] for c in known), sum(c[1] for c in known)) if known else None


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


def report(results: dict[str, list[Variant]], args: argparse.Namespace) -> dict[str, Any]:
    """All numbers as plain values."""
    return dict(
        engine=args.engine,
        threads=args.threads,
        machine=machine(),
        graphs={
            name: [
                dict(
                    name=v.name,
                    milliseconds=[s * 1e3 for s in v.seconds],
                    faster_than_float=v.faster_than(variants[0]),
                    sqnr={n: x if np.isfinite(x) else str(x) for n, x in v.sqnr.items()},
                    int8_convolutions=v.int8,
                    megabytes=v.megabytes,
                    memory_megabytes=v.memory,
                )
                for v in variants
            ]
            for name, variants in results.items()
        },
    )


def machine() -> dict[str, Any]:
    """What the numbers were made on."""
    found: dict[str, Any] = dict(platform=platform.platform())
    for line in (
        Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else ()
    ):
        if line.startswith('model name'):
            found['cpu'] = line.partition(':')[2].strip()
    for package in ('openvino', 'onnxruntime', 'tensorrt'):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def draw(results: dict[str, list[Variant]]) -> Figure:
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
