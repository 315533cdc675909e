#!/usr/bin/env python
"""Fake quantization on a CPU: ours against torch's fused operator, of the same bits.

Example:
    python benchmarks/fake_quant.py --rounds 20
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.fake_quant import fake_quantize
from mmdet3d_quant.core.spec import QuantSpec


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rounds', type=int, default=20, help='default: %(default)s')
    args = parser.parse_args()
    torch.manual_seed(0)
    activation, weight = torch.randn(2, 256, 64, 176).relu_(), torch.randn(512, 512, 3, 3)
    table = Table('', 'ReLU, ms', "torch's operator", 'ours', 'faster')
    for name, x, spec in (
        ('activation, 5.8 million', activation, QuantSpec()),
        ('weight, 2.4 million', weight, QuantSpec(axis=0)),
    ):
        amax = x.abs().amax([d for d in range(4) if d != spec.axis])
        ways: list[Callable[[], torch.Tensor]] = [
            x.relu,
            lambda x=x, amax=amax, spec=spec: fused(x, amax, spec),
            lambda x=x, amax=amax, spec=spec: fake_quantize(x, amax, spec),
        ]
        assert torch.equal(ways[1](), ways[2]())
        relu, theirs, ours = median_ms(ways, args.rounds)
        cells = [f'{t:.2f}' for t in (relu, theirs, ours)]
        table.add_row(name, *cells, f'{theirs / ours:.1f} times')
    Console().print(table)


def fused(x: torch.Tensor, amax: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """torch's operator."""
    fmt = spec.format
    scale = fmt.step(amax).flatten()
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    if spec.axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zeros, fmt.qmin, fmt.qmax)
    ends = spec.axis, fmt.qmin, fmt.qmax
    return torch.fake_quantize_per_channel_affine(x, scale, zeros, *ends)


def median_ms(ways: list[Callable[[], torch.Tensor]], rounds: int) -> list[float]:
    """Median of each, in turns."""
    found: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, times in strict_zip(ways, found):
            start = time.perf_counter()
            way()
            times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times) for times in found]


if __name__ == '__main__':
    main()
