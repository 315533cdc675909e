#!/usr/bin/env python
"""What tools/quantize_config.py makes of mmdet3d's published models, judged model by model.

Real config files, full widths, random weights. The work of the dense parts is counted at the full
size of their inputs; they are calibrated, exported and compiled at a smaller one. Sparse encoders
are counted on voxels drawn at random. Of every model: share of the work in INT8, whether float
mode equals the float model and a reloaded checkpoint the model, the worst layer of every file in
ONNX Runtime (against torch) and OpenVINO (against ONNX Runtime), each layer with equal inputs,
findings of the linter, and the verdict of NVIDIA's compiler.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import MMLogger
from rich.console import Console
from rich.table import Table
from zoo.inputs import cropped, run, settle
from zoo.judges import count, float_equal, judge_files, reload_equal, share_without_deformable
from zoo.models import MODELS, Model
from zoo.page import HEADINGS, cells, read_rows, write_page, write_rows

import mmdet3d_quant as mq
from mmdet3d_quant.core.coverage import coverage
from mmdet3d_quant.engines.tensorrt_rtx import is_installed
from mmdet3d_quant.export import generate_inputs
from mmdet3d_quant.jobs.child_configs import quantize_config
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.image_size import image_size

#: Largest side of the inputs that are run.
SIDE = 128
EXAMPLE = """
examples:
  python benchmarks/zoo_coverage.py
  python benchmarks/zoo_coverage.py --only PointPillars SMOKE --no-compile
  python benchmarks/zoo_coverage.py --json docs/detectors.json --page docs/detectors.md
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [m.name for m in MODELS]
    parser.add_argument('--only', nargs='*', choices=names, metavar='NAME', help=', '.join(names))
    parser.add_argument('--side', type=int, default=SIDE, help='largest side of inputs that run')
    parser.add_argument('--no-compile', action='store_true', help='leave the compiler out')
    parser.add_argument('--sm', default='SM89', help='GPU generation; default: %(default)s')
    parser.add_argument(
        '--json', type=Path, help='write all numbers here; rows of models that do not run stay'
    )
    parser.add_argument(
        '--page', type=Path, help='put the table of all rows of --json into this Markdown file'
    )
    args = parser.parse_args()
    if args.page and not args.json:
        parser.error('--page is made of the rows of --json: give both')
    return args


def cpu_time() -> float:
    """Seconds of one core that this process and its children took."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(model: Model, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one model."""
    start = cpu_time()
    config = model.write(folder)
    written = quantize_config(config, folder / f'{config.stem}_int8.py')
    cfg = fc.read_config(written.int8)
    torch.manual_seed(0)
    detector = fc.build_model(cfg)
    full = generate_inputs(detector, 1, image_size=image_size(cfg))
    small = full if 'depth' in full else cropped(full, args.side)  # a view has its own size
    settle(detector, small)
    equal = float_equal(detector, fc.build_model(fc.read_config(config)), small)
    found = coverage(detector, count(detector, full, small))
    mq.calibrate(detector, [small], 'max', forward=run)
    checkpoint = folder / 'int8.pth'
    torch.save(dict(state_dict=detector.state_dict()), checkpoint)
    again = fc.build_model(cfg)
    fc.load_weights(again, checkpoint, calibrated=True)
    sm = args.sm if is_installed() and not args.no_compile else None
    return dict(
        model=model.name,
        layers=len(found.layers),
        quantized=len(found.quantized),
        share=found.share,
        share_without_deformable=share_without_deformable(detector, found),
        float=[
            dict(module=g['module'], share=g['share'], reason=g['reason'])
            for g in found.float_groups()
        ],
        float_equal=equal,
        reload_equal=reload_equal(detector, again, small),
        files=judge_files(detector, again, small, folder, sm),
        seconds=round(cpu_time() - start),
    )


def main() -> None:
    args = parse_args()
    console = Console(width=170)
    warnings.filterwarnings('ignore')
    MMLogger.get_current_instance().setLevel('WARNING')  # of every layer that is loaded
    rows = {row['model']: row for row in (read_rows(args.json) if args.json else [])}
    told = []
    for model in MODELS:
        if args.only is not None and model.name not in args.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = measure(model, Path(folder), args)
            except Exception as err:  # one row, whatever it is
                row = dict(model=model.name, error=f'{type(err).__name__}: {err}'[:300])
        console.print(*cells(row), f'{row.get("seconds", "-")} s', sep='  ', markup=False)
        rows[model.name] = row
        told.append(row)
        if args.json:
            write_rows([rows[m.name] for m in MODELS if m.name in rows], args.json)
    if args.page:
        write_page([rows[m.name] for m in MODELS if m.name in rows], args.page)
    table = Table(*HEADINGS, title='INT8 by the output of quantize_config.py')
    for row in told:
        table.add_row(*cells(row))
    console.print(table)


if __name__ == '__main__':
    main()
