#!/usr/bin/env python
"""Time and memory of a training step of a ResNet-50 camera branch: float, ours, stock.

A step is forward, backward and SGD. Ours trains as the QATHook has it: fake quantization of
activations and weights, weight ranges that follow the weights; ``learned`` learns the ranges of
activations, too. Stock has pytorch-quantization's own TensorQuantizer in every place, as NVIDIA's
CUDA-BEVFusion uses it, with fixed ranges. All take turns step by step, in turning order, so that
the machine's moods hit all alike. Memory is the peak of a process of its own.

With --device cuda: a table of precisions, channels first and last, eager, compiled (reduced:
with CUDA graphs) and as a CUDA graph, without stock (qat_gpu.py).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import qat_gpu
import torch
from calibration import branch, forward, images
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import mmdet3d_quant as mq
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines.memory import peak_memory
from mmdet3d_quant.qat import LearnedRanges, WeightRanges

KINDS = ('float', 'ours', 'learned', 'stock')
EXAMPLE = """
examples:
  python benchmarks/qat_step.py
  python benchmarks/qat_step.py --cameras 1 --size 128 352 --steps 10
  python benchmarks/qat_step.py --device cuda --cameras 24 --steps 16 --no-neck
  python benchmarks/qat_step.py --device cuda --precision float16 --mode graph compiled
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--size', type=int, nargs=2, default=(256, 704), help='height width')
    parser.add_argument('--cameras', type=int, default=2, help='default: %(default)s')
    parser.add_argument('--steps', type=int, default=8, help='default: %(default)s')
    parser.add_argument('--kinds', nargs='+', choices=KINDS, help='default: all; float is first')
    parser.add_argument('--device', default='cpu', help='cpu or cuda; default: %(default)s')
    parser.add_argument('--amp', action='store_true', help='bfloat16; on a GPU see --precision')
    parser.add_argument('--memory', choices=KINDS, help=argparse.SUPPRESS)
    gpu = parser.add_argument_group('on a GPU')
    gpu.add_argument('--precision', nargs='+', choices=qat_gpu.TYPES, default=list(qat_gpu.TYPES))
    gpu.add_argument('--layout', nargs='+', choices=('first', 'last'), default=('last', 'first'))
    gpu.add_argument('--mode', nargs='+', choices=qat_gpu.MODES, default=('eager',))
    gpu.add_argument('--no-neck', dest='neck', action='store_false', help='the backbone alone')
    gpu.add_argument('--limit', type=float, default=1e9, help='seconds to start settings in')
    gpu.add_argument('--out', help='file to add a line of JSON to for each setting')
    args = parser.parse_args()
    args.kinds = args.kinds or (KINDS if torch.device(args.device).type == 'cpu' else KINDS[:3])
    return args


def calibrated() -> nn.Module:
    """The branch with ranges, batch norm frozen."""
    model = branch()
    mq.calibrate(model, images(1, 1, (128, 352)), 'max', forward=forward)
    return model


def stepper(kind: str, amp: bool) -> Callable[[Tensor], None]:
    """A model of one kind and all that a step of it does."""
    model = calibrated()
    if kind == 'float':
        mq.set_mode(model, 'float')
    elif kind == 'stock':
        _put_stock(model)
    elif kind == 'learned':
        for quantizer in mq.quantizers(model).values():
            if quantizer.spec.axis is None:
                quantizer.learn()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    if kind == 'learned':
        LearnedRanges(model).attach(optimizer)
    if kind in ('ours', 'learned'):
        weights = WeightRanges(model)
        optimizer.register_step_post_hook(lambda *_: weights.follow())

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            outputs = forward(model, x)
        sum(y.float().square().mean() for y in outputs).backward()
        optimizer.step()

    return step


def _put_stock(model: nn.Module) -> None:
    """Stock quantizers with the ranges of ours, in their places."""
    for name, ours in mq.quantizers(model).items():
        parent, _, attribute = name.rpartition('.')
        theirs = TensorQuantizer(QuantDescriptor(num_bits=8, axis=ours.spec.axis))
        theirs.amax = ours.amax.clone()
        setattr(model.get_submodule(parent), attribute, theirs)


def compare(args: argparse.Namespace, console: Console) -> None:
    """All kinds in turns."""
    steps = {kind: stepper(kind, args.amp) for kind in args.kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    data = images(args.steps + 1, args.cameras, tuple(args.size))
    for i, x in enumerate(track(data, 'Steps', total=args.steps + 1, console=console)):
        for kind, step in sorted(steps.items(), reverse=bool(i % 2)):
            start = time.perf_counter()
            step(x)
            if i:  # the first one warms up
                seconds[kind].append(time.perf_counter() - start)
    table = Table('', 'median, ms', 'times float', 'spread of the ratio', 'peak memory, MiB')
    base = seconds[args.kinds[0]]
    for kind, found in seconds.items():
        ratios = sorted(a / b for a, b in strict_zip(found, base))
        table.add_row(
            kind,
            f'{statistics.median(found) * 1e3:.0f}',
            f'{statistics.median(ratios):.3f}',
            f'{ratios[0]:.3f} to {ratios[-1]:.3f}',
            _memory(kind, args),
        )
    console.print(table)
    console.print(
        f'{args.cameras}x3x{args.size[0]}x{args.size[1]}, {args.steps} steps, '
        f'{"mixed precision" if args.amp else "float32"}, torch {torch.__version__}, '
        f'{torch.get_num_threads()} threads; '
        'ratios are taken step by step, their median is shown'
    )


def _memory(kind: str, args: argparse.Namespace) -> str:
    command = [sys.executable, __file__, '--memory', kind, '--cameras', str(args.cameras)]
    command += ['--size', *map(str, args.size)]
    command += ['--amp'] if args.amp else []
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return found.stdout.split()[-1]


def main() -> None:
    args = parse_args()
    if args.memory:
        step = stepper(args.memory, args.amp)
        for x in images(2, args.cameras, tuple(args.size)):
            step(x)
        print(peak_memory() // 2**20)
    elif torch.device(args.device).type == 'cpu':
        compare(args, Console())
    else:
        print(f'{torch.cuda.get_device_name(args.device)}, torch {torch.__version__}')
        qat_gpu.run(args)


if __name__ == '__main__':
    main()
