#!/usr/bin/env python
"""Correct biases of two convolutions, and round their weights, with AMD's Brevitas.

Runs in an environment of its own, without this project:

  python3 -m venv /tmp/brevitas-venv
  /tmp/brevitas-venv/bin/pip install brevitas==0.13.4
  /tmp/brevitas-venv/bin/python benchmarks/peer_files/brevitas_layers.py case.npz out.npz

case.npz holds ``weight0``, ``bias0``, ``amax0`` and the same of layer 1, ``bits``, and the batches
``seen`` and ``judged``, (batches, samples, channels, height, width). Ranges are given, so that only
the methods differ. out.npz gets ``bias0`` and ``bias1``, corrected, and ``output``, what the net
with rounded weights makes of ``judged``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import numpy as np
import torch
from brevitas.graph.calibrate import bias_correction_mode
from brevitas.graph.gpfq import gpfq_mode
from brevitas.inject.enum import ScalingImplType
from brevitas.quant import Int8WeightPerChannelFloat
from brevitas.quant.scaled_int import Int8ActPerTensorFloat
from torch import nn


def net(case: dict[str, np.ndarray]) -> nn.Sequential:
    """Two convolutions with a ReLU between, quantized with the ranges of the case."""
    bits = [int(n) for n in case['bits']]

    class Weight(Int8WeightPerChannelFloat):
        bit_width = bits[0]

    def layer(number: int) -> Any:
        class Activation(Int8ActPerTensorFloat):
            bit_width = bits[1]
            narrow_range = True
            scaling_impl_type = ScalingImplType.CONST
            scaling_init = float(case[f'amax{number}'])
            restrict_scaling_type = 'FP'

        weight, bias = (torch.tensor(case[f'{kind}{number}']) for kind in ('weight', 'bias'))
        made = qnn.QuantConv2d(*weight.shape[1::-1], 3, input_quant=Activation, weight_quant=Weight)
        with torch.no_grad():
            made.weight.copy_(weight)
            made.bias.copy_(bias)
        return made

    return nn.Sequential(layer(0), nn.ReLU(), layer(1)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('case', type=Path)
    parser.add_argument('out', type=Path)
    args = parser.parse_args()
    with np.load(args.case) as arrays:
        case = {name: arrays[name] for name in arrays.files}
    seen = torch.tensor(case['seen'])
    corrected, rounded = net(case), net(case)
    with torch.no_grad():
        with bias_correction_mode(corrected):
            for x in seen:
                corrected(x)
        with gpfq_mode(rounded) as mode:
            for _ in range(mode.num_layers):
                for x in seen:
                    mode.model(x)
                mode.update()
        found = {f'bias{i}': corrected[2 * i].bias.numpy() for i in (0, 1)}
        output = torch.stack([rounded(x) for x in torch.tensor(case['judged'])])
        found['output'] = getattr(output, 'value', output).numpy()
    np.savez(args.out, **found)


if __name__ == '__main__':
    main()
