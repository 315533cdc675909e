#!/usr/bin/env python
"""Quantize a float ONNX graph with NNCF's post-training quantization, as a peer to measure against.

Runs in an environment of its own, without this project, since NNCF and torch of this project do
not agree on versions:

  python3 -m venv /tmp/nncf-venv
  /tmp/nncf-venv/bin/pip install nncf openvino onnx onnxruntime
  /tmp/nncf-venv/bin/python tools/nncf_peer.py float.onnx calibration.npz out.xml

An out.onnx is made from the ONNX graph by NNCF's own path for it, with Q/DQ nodes.

calibration.npz holds one array per input of the graph, samples along a new first axis.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import nncf
import numpy as np
import onnx
import openvino as ov
from onnx import numpy_helper


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('float', type=Path, help='float ONNX file')
    parser.add_argument('calibration', type=Path, help='inputs to calibrate on, .npz')
    parser.add_argument('out', type=Path, help='.xml to write, with a .bin beside, or .onnx')
    parser.add_argument('--preset', choices=('performance', 'mixed'), default='performance')
    parser.add_argument(
        '--signed',
        action='store_true',
        help='of ONNX: UINT8 tensors become INT8 of the same range, which TensorRT takes',
    )
    args = parser.parse_args()
    nncf.set_log_level(logging.ERROR)
    with np.load(args.calibration) as arrays:
        stacked = {name: arrays[name] for name in arrays.files}
    count = len(next(iter(stacked.values())))
    samples = [{name: value[i] for name, value in stacked.items()} for i in range(count)]
    is_onnx = args.out.suffix == '.onnx'
    model = nncf.quantize(
        onnx.load(args.float) if is_onnx else ov.Core().read_model(args.float),
        nncf.Dataset(samples),
        preset=nncf.QuantizationPreset(args.preset),
        target_device=nncf.TargetDevice.CPU,
        subset_size=count,
    )
    if args.signed:
        to_signed(model.graph)
    if is_onnx:
        onnx.save(model, args.out)
    else:
        ov.save_model(model, args.out, compress_to_fp16=False)


def to_signed(graph: onnx.GraphProto) -> None:
    """Replaces UINT8 by INT8 in a graph whose zero points are zero: half the steps, equal range."""
    del graph.value_info[:]
    stored = {i.name: i for i in graph.initializer}
    pairs = [n.input for n in graph.node if n.op_type in ('QuantizeLinear', 'DequantizeLinear')]
    for scale, zero in {(inputs[1], inputs[2]) for inputs in pairs if len(inputs) > 2}:
        value = numpy_helper.to_array(stored[zero])
        if value.any():
            raise ValueError(f'{zero} is no zero: symmetric ranges only')
        if value.dtype == np.uint8:
            steps = numpy_helper.to_array(stored[scale]) * np.float32(255 / 127)
            stored[scale].CopyFrom(numpy_helper.from_array(steps, scale))
            stored[zero].CopyFrom(numpy_helper.from_array(value.astype(np.int8), zero))


if __name__ == '__main__':
    main()
