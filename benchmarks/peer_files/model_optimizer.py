#!/usr/bin/env python
"""Quantize an ONNX graph with NVIDIA's Model-Optimizer, or type it FP16 with its AutoCast.

Runs in an environment of its own, without this project, since Model-Optimizer wants a newer torch:

  python3 -m venv /tmp/mo-venv
  /tmp/mo-venv/bin/pip install 'nvidia-modelopt[onnx]==0.47.0'
  /tmp/mo-venv/bin/python benchmarks/peer_files/model_optimizer.py float.onnx inputs.npz out.onnx

With --autocast the file, with Q/DQ nodes or without, is only typed FP16.

inputs.npz holds one array per input of the graph, samples along a new first axis.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx

#: Of FP16 in opset 19, the first whose scales may be FP16.
OPSET = 19


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('graph', type=Path, help='ONNX file')
    parser.add_argument('inputs', type=Path, help='inputs to calibrate on, .npz')
    parser.add_argument('out', type=Path, help='ONNX file to write')
    parser.add_argument('--autocast', action='store_true', help='type the file FP16')
    parser.add_argument('--method', choices=('entropy', 'max'), default='entropy')
    parser.add_argument(
        '--precision', choices=('fp32', 'fp16'), default='fp32', help='of what is not quantized'
    )
    args = parser.parse_args()
    with np.load(args.inputs) as arrays:
        samples = {name: arrays[name] for name in arrays.files}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / args.graph.name  # the file that it is given may be rewritten
        shutil.copy(args.graph, copy)
        (autocast if args.autocast else quantize)(copy, samples, args)


def quantize(graph: Path, samples: dict[str, np.ndarray], args: argparse.Namespace) -> None:
    from modelopt.onnx.quantization import quantize

    quantize(
        str(graph),
        'int8',
        # Samples follow each other along the first axis of the graph's inputs.
        calibration_data={name: np.concatenate(list(value)) for name, value in samples.items()},
        calibration_method=args.method,
        calibration_eps=['cpu'],
        high_precision_dtype=args.precision,
        output_path=str(args.out),
        log_level='WARNING',
    )


def autocast(graph: Path, samples: dict[str, np.ndarray], args: argparse.Namespace) -> None:
    from modelopt.onnx.autocast import convert_to_mixed_precision

    folder = graph.parent / 'samples'
    folder.mkdir()
    for i in range(len(next(iter(samples.values())))):
        np.savez(folder / f'{i}.npz', **{name: value[i] for name, value in samples.items()})
    model = convert_to_mixed_precision(
        str(graph), low_precision_type='fp16', calibration_data=str(folder), opset=OPSET
    )
    onnx.save(model, str(args.out))


if __name__ == '__main__':
    main()
