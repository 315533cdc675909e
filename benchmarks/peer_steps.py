#!/usr/bin/env python
"""Bias correction and learned rounding beside AMD's Brevitas, on the same two layers.

Two convolutions with a ReLU between, and ranges that are given to both: what is compared is the
method. Corrected biases must be equal. Of rounded weights the error of the output on other batches
counts: to nearest, by Brevitas (GPFQ, greedy and in closed form), and learned.

Example:
    python3 -m venv /tmp/brevitas-venv && /tmp/brevitas-venv/bin/pip install brevitas==0.13.4
    python benchmarks/peer_steps.py --brevitas-python /tmp/brevitas-venv/bin/python

The exit code is 1 if biases differ, or if learned rounding leaves more error than Brevitas does.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.improve import BiasCorrection, LearnedRounding
from mmdet3d_quant.layers import QuantConv2d

#: Bits of weights and activations, and largest difference of biases, of the largest correction.
BITS, TOLERANCE = (4, 8), 1e-4
PEER = Path(__file__).with_name('peer_files') / 'brevitas_layers.py'


def make(seed: int) -> tuple[nn.Sequential, list[torch.Tensor]]:
    """Random layers, and batches whose channels depend on each other, as those of a map do."""
    torch.manual_seed(seed)
    net = nn.Sequential(QuantConv2d(16, 24, 3), nn.ReLU(), QuantConv2d(24, 16, 3)).eval()
    for name, quantizer in mq.quantizers(net).items():
        quantizer.num_bits = BITS[not name.endswith('_weight_quantizer')]
    mix = torch.randn(16, 16)
    batches = [torch.einsum('oi,bihw->bohw', mix, torch.randn(4, 16, 16, 16)) for _ in range(8)]
    return net, [batch.relu() for batch in batches]


def calibrated(net: nn.Sequential, batches: list[torch.Tensor], after: list) -> nn.Sequential:
    """A copy with ranges of two batches, changed on the four that follow."""
    net = copy.deepcopy(net)
    mq.calibrate(net, batches[:2], 'max', held_out=batches[2:6], after=after)
    return net


@torch.no_grad()
def error(net: nn.Sequential, exact: nn.Sequential, batches: list[torch.Tensor]) -> float:
    """Squared error of the output over its square, on the last two batches."""
    return _error(torch.stack([net(x) for x in batches[6:]]), exact, batches)


@torch.no_grad()
def _error(found: torch.Tensor, exact: nn.Sequential, batches: list[torch.Tensor]) -> float:
    with mq.set_mode(exact, 'float'):
        wanted = torch.stack([exact(x) for x in batches[6:]])
    return float((found - wanted).square().sum() / wanted.square().sum())


def compare(python: str, seed: int) -> dict[str, float]:
    """Runs both on the layers of a seed."""
    net, batches = make(seed)
    nearest = calibrated(net, batches, [])
    case = dict(bits=np.array(BITS))
    case.update(seen=torch.stack(batches[2:6]).numpy(), judged=torch.stack(batches[6:]).numpy())
    for number, layer in enumerate((nearest[0], nearest[2])):
        case[f'weight{number}'] = layer.weight.detach().numpy()
        case[f'bias{number}'] = layer.bias.detach().numpy()
        case[f'amax{number}'] = layer._input_quantizer.amax.numpy()
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / 'case.npz', Path(folder) / 'out.npz'
        np.savez(given, **case)
        subprocess.run([python, str(PEER), str(given), str(made)], check=True)
        with np.load(made) as arrays:
            theirs = {name: torch.tensor(arrays[name]) for name in arrays.files}
    corrected = calibrated(net, batches, [BiasCorrection(['*'])])
    moved = [(corrected[i].bias - net[i].bias).detach() for i in (0, 2)]
    peer = [theirs[f'bias{n}'] - net[i].bias.detach() for n, i in enumerate((0, 2))]
    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(moved, peer))
    return dict(
        biases=off,
        nearest=error(nearest, net, batches),
        brevitas=_error(theirs['output'], net, batches),
        ours=error(calibrated(net, batches, [LearnedRounding()]), net, batches),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--brevitas-python', required=True, help='a Python with brevitas')
    parser.add_argument('--seeds', type=int, default=3, help='%(default)s')
    args = parser.parse_args()
    rows = [compare(args.brevitas_python, seed) for seed in range(args.seeds)]
    table = Table('seed', 'biases differ by', 'nearest', 'Brevitas, GPFQ', 'learned rounding')
    for seed, row in enumerate(rows):
        errors = (f'{100 * row[name]:.2f} %' for name in ('nearest', 'brevitas', 'ours'))
        table.add_row(str(seed), f'{row["biases"]:.1e}', *errors)
    Console().print(table)
    return int(any(r['biases'] > TOLERANCE or r['ours'] > r['brevitas'] for r in rows))


if __name__ == '__main__':
    sys.exit(main())
