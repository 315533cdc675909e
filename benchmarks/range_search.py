#!/usr/bin/env python
"""Range search for all quantizers at once against pytorch-quantization's, one after another."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import torch
from pytorch_quantization.calib import histogram as library
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmdet3d_quant.calibration.amax import search_many
from mmdet3d_quant.calibration.histogram import Histogram
from mmdet3d_quant.core.spec import Method

EXAMPLE = """
examples:
  python benchmarks/range_search.py
  python benchmarks/range_search.py --quantizers 140 --library 4 --rounds 5

The histograms are of the kinds that a ResNet's layers give: half-normal, ReLU's zeros with half a
normal distribution, exponential, heavy tails. Each is taken as the library collects it (2048 bins
up to the largest value) and as Histogram does (2049 to 4096 bins).
"""
METHODS = ('percentile', 'mse', 'entropy')
KINDS: tuple[Callable, ...] = (
    lambda rng, size: np.abs(rng.normal(size=size)),
    lambda rng, size: np.maximum(rng.normal(size=size), 0),
    lambda rng, size: rng.exponential(size=size),
    lambda rng, size: np.maximum(rng.standard_t(4, size=size), 0),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--quantizers', type=int, default=69, help="ResNet-50's: %(default)s")
    parser.add_argument('--values', type=int, default=1_000_000, help='in each histogram')
    parser.add_argument('--rounds', type=int, default=3, help='of ours; the median counts')
    parser.add_argument(
        '--library', type=int, default=8, help='histograms that it searches by mse and entropy'
    )
    parser.add_argument('--threads', type=int, default=2)
    return parser.parse_args()


def collect(args: argparse.Namespace) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """The same values as both kinds of histogram, by the name of the kind."""
    rng = np.random.default_rng(0)
    theirs, ours = [], []
    for i in range(args.quantizers):
        values = KINDS[i % len(KINDS)](rng, args.values) * rng.uniform(0.5, 4)
        x = torch.from_numpy(values).float()
        calibrator = library.HistogramCalibrator(8, None, False)
        calibrator.collect(x)
        theirs.append((calibrator._calib_hist.int().numpy(), calibrator._calib_bin_edges.numpy()))
        ours.append(Histogram.of(x).trimmed())
    return {'2048': theirs, 'to 4096': ours}


def library_range(counts: np.ndarray, edges: np.ndarray, method: Method) -> float:
    if method.name == 'percentile':
        return float(library._compute_amax_percentile(counts, edges, method.percentile))
    search = getattr(library, f'_compute_amax_{method.name}')
    return float(search(counts.copy(), edges, 8, False))  # entropy's changes the counts


def seconds(call: Callable, *args, **options) -> tuple[float, list[float]]:
    start = time.perf_counter()
    result = call(*args, **options)
    return time.perf_counter() - start, result


def library_ranges(cases: list, method: Method) -> list[float]:
    with patch.object(torch.Tensor, 'cuda', lambda self: self):  # its mse asks for a GPU
        return [library_range(counts, edges, method) for counts, edges in cases]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    devices = ['cpu'] + ['cuda'] * torch.cuda.is_available()
    table = Table('method', 'bins', 'device', 'library', 'of', 'ours', 'ratio', 'difference')
    work = [(bins, cases, m) for bins, cases in collect(args).items() for m in METHODS]
    for bins, cases, name in track(work, 'searching', console=Console(stderr=True)):
        method = Method.parse(name)
        some = cases if method.name == 'percentile' else cases[: args.library]
        slow, expected = seconds(library_ranges, some, method)
        slow *= 1e3 / len(some)
        for device in devices:
            search_many(cases[:1], method, device=device)  # the first call sets the device up
            rounds = [
                seconds(search_many, cases, method, device=device) for _ in range(args.rounds)
            ]
            fast = float(np.median([time for time, _ in rounds])) * 1e3 / len(cases)
            found = np.array(rounds[-1][1][: len(some)])
            apart = float(np.max(np.abs(found / np.array(expected) - 1)))
            times = (f'{slow:.2f}', f'{len(some)}', f'{fast:.2f}', f'{slow / fast:.1f}x')
            table.add_row(name, bins, device, *times, f'{apart:.0e}')
    console = Console()
    console.print(table)
    console.print(
        f'Milliseconds per quantizer and largest relative difference of the ranges; {len(cases)} '
        f'quantizers, threads: {args.threads}. The library searches one histogram after another '
        'on the CPU ("of" so many), ours all of them at once.'
    )


if __name__ == '__main__':
    main()
