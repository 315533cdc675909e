#!/usr/bin/env python
"""Find the step from float model to engines, and the layer, where results go wrong."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from examples import add_input_options, example_inputs
from mmengine.config import DictAction
from rich.progress import Progress
from rich.table import Table
from terminal import open_console, run_tool
from torch import nn

from mmdet3d_quant.check.detector import as_exported, manifest_problems
from mmdet3d_quant.check.ladder import Rung, climb, first_fault, missing_points
from mmdet3d_quant.engines import ENGINES, Engine, make_engine
from mmdet3d_quant.export import ExportError, detector_cuts
from mmdet3d_quant.export.manifest import read_manifest
from mmdet3d_quant.export.targets import DEFAULT
from mmdet3d_quant.files.outputs import check_writable, whole
from mmdet3d_quant.files.plain import finite_or_text
from mmdet3d_quant.runs import from_config as fc

EXAMPLE = """
examples:
  python tools/parity.py $CONFIG int8.pth onnx/int8
  python tools/parity.py $CONFIG int8.pth onnx/int8 --engines onnxruntime openvino tensorrt

The steps: float, fake-quant, reloaded (weights saved, model built anew and loaded), folded (batch
norm), the engines, and FP16 (every tensor outside of Q/DQ pairs rounded to it, as engines of the
file's target may), each on the same inputs. Every layer is also compared by itself, with
equal inputs, except across a quantizer that is not found in the file, which another tool may have
renamed; the range of each quantizer is held against its tensor. Exit code: 0 all steps agree,
1 they do not, 2 the comparison cannot be made.
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config with Quant* types')
    parser.add_argument('checkpoint', help='calibrated checkpoint')
    parser.add_argument('folder', type=Path, help='files and manifest.json, of export_onnx.py')
    parser.add_argument(
        '--engines', nargs='+', choices=ENGINES, default=['onnxruntime', 'openvino']
    )
    parser.add_argument('--threads', type=int, default=2, help='default: %(default)s')
    parser.add_argument('--files', nargs='+', help='only these, such as fuser; default: all')
    add_input_options(parser)
    parser.add_argument('--json', type=Path, help='write all numbers here, by layer too')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE overrides of the config'
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    console = open_console()
    if args.json:
        check_writable(args.json)
    manifest = read_manifest(args.folder)
    for problem in manifest_problems(manifest, args.folder, args.checkpoint):
        console.print(f'[yellow]{problem}')
    quantized = manifest.get('precision') != 'float'
    target = manifest.get('target', DEFAULT)
    cfg = fc.read_config(args.config, args.cfg_options)
    model = fc.build_model(cfg)
    fc.load_weights(model, args.checkpoint, calibrated=quantized)
    inputs, real = example_inputs(cfg, model, args, console)
    told = as_exported(model, args.folder)
    cuts = detector_cuts(told, inputs, target)
    unknown = sorted(set(args.files or ()) - {c.name for c in cuts})
    if unknown or not cuts:
        known = ', '.join(c.name for c in cuts) or 'none'
        raise ExportError(
            f'no file of the detector is among {", ".join(unknown)}; its files: {known}'
        )
    cuts = [c for c in cuts if not args.files or c.name in args.files]
    missing = [c.name for c in cuts if not (args.folder / f'{c.name}.onnx').is_file()]
    if missing:
        raise ExportError(f'{args.folder} has no {missing[0]}.onnx; export again')
    reloaded = as_exported(reload(cfg, model, quantized), args.folder)
    again = {c.name: c.module for c in detector_cuts(reloaded, inputs, target)}
    engines: dict[str, Callable[[Path], Engine]] = {
        name: partial(make_engine, name, num_threads=args.threads) for name in args.engines
    }
    rungs: list[Rung] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task('', total=len(cuts) * (5 + len(engines)))
        for cut in cuts:

            def tell(stage: str, name: str = cut.name) -> None:
                progress.update(task, advance=1, description=f'{name}: {stage}')

            path = args.folder / f'{cut.name}.onnx'
            rungs += climb(cut, again[cut.name], path, engines, quantized, tell, real)
    console.print(table(rungs))
    missing = missing_points(rungs)
    for text in missing:
        console.print(f'[yellow]{text}')
    if args.json:
        with whole(args.json) as part:
            Path(part).write_text(
                json.dumps([finite_or_text(r.as_dict()) for r in rungs], indent=1)
            )
        console.print(f'Wrote {args.json}')
    first = first_fault(rungs)
    if first is None:
        console.print(f'All steps agree{" in their outputs" if missing else ""}.')
        return 0
    console.print(f'[red]Numbers part at {first.stage}[/red], {first.cut}: {first.fault}')
    return 1


def reload(cfg: Any, model: nn.Module, quantized: bool) -> nn.Module:
    """The model, built anew from its config and loaded from its saved weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.pth'
        torch.save(dict(state_dict=model.state_dict()), path)
        again = fc.build_model(cfg)
        fc.load_weights(again, path, calibrated=quantized)
    return again


def worst(values: dict[str, float]) -> float:
    """The least value; NaN if one is."""
    return min(values.values(), key=lambda v: (not math.isnan(v), v))


def table(rungs: list[Rung]) -> Table:
    """A row per file and step; of several outputs, and of all layers, the worst."""
    result = Table(title='SQNR of the worst output, dB', title_justify='left')
    numbers = ('to the step before', 'to float', 'worst layer alone', 'points')
    for heading in ('file', 'step', *numbers, ''):
        result.add_column(heading, justify='right' if heading in numbers else 'left')
    last = ''
    for rung in rungs:
        if rung.stage == 'float':
            continue
        values = [rung.to_previous, rung.to_float, rung.layers]
        result.add_row(
            rung.cut if rung.cut != last else '',
            rung.stage,
            *(f'{worst(v):.1f}' if v else '' for v in values),
            '{} of {}'.format(*rung.points) if rung.points[1] else '',
            '[red]apart' if rung.fault else '',
        )
        last = rung.cut
    return result


if __name__ == '__main__':
    run_tool(main, failure=2)
