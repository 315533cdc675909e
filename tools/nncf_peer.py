#!/usr/bin/env python
"""Quantize a float ONNX graph with NNCF's post-training quantization, as a peer to measure against.

Runs in an environment of its own, without this project, since NNCF and torch of this project do
not agree on versions:

  python3 -m venv /tmp/nncf-venv
  /tmp/nncf-venv/bin/pip install nncf openvino onnx
  /tmp/nncf-venv/bin/python tools/nncf_peer.py float.onnx calibration.npz out.xml

calibration.npz holds one array per input of the graph, samples along a new first axis.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import nncf
import numpy as np
import openvino as ov


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('float', type=Path, help='float ONNX file')
    parser.add_argument('calibration', type=Path, help='inputs to calibrate on, .npz')
    parser.add_argument('out', type=Path, help='.xml to write, with a .bin beside')
    parser.add_argument('--preset', choices=('performance', 'mixed'), default='performance')
    args = parser.parse_args()
    nncf.set_log_level(logging.ERROR)
    with np.load(args.calibration) as arrays:
        stacked = {name: arrays[name] for name in arrays.files}
    count = len(next(iter(stacked.values())))
    samples = [{name: value[i] for name, value in stacked.items()} for i in range(count)]
    model = nncf.quantize(
        ov.Core().read_model(str(args.float)),
        nncf.Dataset(samples),
        preset=nncf.QuantizationPreset(args.preset),
        target_device=nncf.TargetDevice.CPU,
        subset_size=count,
    )
    ov.save_model(model, str(args.out), compress_to_fp16=False)


if __name__ == '__main__':
    main()
