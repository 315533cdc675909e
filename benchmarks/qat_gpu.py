"""What qat_step.py measures on a GPU: settings of precision, layout and mode, one by one.

In each setting float and quantized models take turns step by step, in turning order. Memory is the
peak that torch allocates in a step of the only model there; of CUDA graphs, whose memory is a pool
that lies there all the time, what torch reserves. Nothing waits for the GPU but the clock at the
end of a step.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from calibration import BACKBONE, NECK, branch, images
from mmdet3d.registry import MODELS
from torch import Tensor, nn

import mmdet3d_quant as mq
import mmdet3d_quant.bevfusion  # noqa: F401 - the float neck
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.ties import share_ranges
from mmdet3d_quant.qat import LearnedRanges, WeightRanges

#: 'reduced' is compiled with ``mode='reduce-overhead'``: CUDA graphs, which torch makes.
MODES = ('eager', 'graph', 'compiled', 'reduced')
TYPES = {'float32': None, 'float16': torch.float16, 'bfloat16': torch.bfloat16}


class Camera(nn.Module):
    """Backbone, and neck if there is one."""

    def __init__(self, backbone: nn.Module, neck: nn.Module | None = None) -> None:
        super().__init__()
        self.img_backbone, self.img_neck = backbone, neck

    def forward(self, x: Tensor) -> Any:
        """Images to features."""
        features = self.img_backbone(x)
        return features if self.img_neck is None else self.img_neck(features)


def models(neck: bool, device: str) -> dict[str, nn.Module]:
    """The float model, of float types, and the quantized one with ranges; batch norm frozen."""
    both = branch()
    quantized = Camera(both['img_backbone'], both['img_neck'] if neck else None).to(device).eval()
    mq.calibrate(quantized, (x.to(device) for x in images(1, 1, (128, 352))), 'max')
    backbone = MODELS.build({**BACKBONE, 'type': 'mmdet.ResNet'})
    configs = [{**NECK, 'type': 'GeneralizedLSSFPN'}] if neck else []
    plain = Camera(backbone, *(MODELS.build(config) for config in configs)).to(device).eval()
    plain.load_state_dict(mq.core.modes.float_state_dict(quantized))
    return {'float': plain, 'ours': quantized}


def variant(kind: str, made: dict[str, nn.Module], last: bool) -> nn.Module:
    """A copy of the model of one kind; the ranges of ``learned`` are parameters."""
    model = copy.deepcopy(made['float' if kind == 'float' else 'ours'])
    if last:
        model.to(memory_format=torch.channels_last)
    if kind == 'learned':
        for quantizer in mq.quantizers(model).values():
            if quantizer.spec.axis is None:
                quantizer.learn()
    share_ranges(model)
    return model


def stepper(
    kind: str, made: dict[str, nn.Module], amp: torch.dtype | None, last: bool, mode: str
) -> Callable[[Tensor], None]:
    """A model of one kind, and all that a step of it does."""
    model = run = variant(kind, made, last)
    if mode in ('compiled', 'reduced'):
        run = torch.compile(model, mode='reduce-overhead' if mode == 'reduced' else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    if kind == 'learned':
        LearnedRanges(model).attach(optimizer)
    weights = None if kind == 'float' else WeightRanges(model)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        with nullcontext() if amp is None else torch.autocast(x.device.type, amp):
            outputs = run(x)
        sum(y.float().square().mean() for y in outputs).backward()
        optimizer.step()
        if weights is not None:
            weights.follow()

    return _Graph(step) if mode == 'graph' else step


class _Graph:
    """A step as a CUDA graph: captured once, then replayed without Python."""

    def __init__(self, step: Callable[[Tensor], None]) -> None:
        self.step, self.graph = step, None

    def __call__(self, x: Tensor) -> None:
        """Replays the step; ``x`` is the same tensor in every call."""
        if self.graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.step(x)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step(x)
        self.graph.replay()


def settings(args: Namespace) -> Iterator[tuple[str, str, str]]:
    """Precision, layout and mode."""
    for mode, layout, precision in itertools.product(args.mode, args.layout, args.precision):
        yield precision, layout, mode


def measure(args: Namespace, setting: tuple[str, str, str], made: dict[str, nn.Module]) -> dict:
    """Milliseconds and memory of each kind in a setting."""
    precision, layout, mode = setting
    amp, last = TYPES[precision], layout == 'last'
    x = next(images(1, args.cameras, tuple(args.size))).to(args.device)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    peaks, steps, first = {}, {}, {}
    cuda = x.is_cuda
    for kind in args.kinds:
        gc.collect()
        before = _memory(mode, cuda)
        step = stepper(kind, made, amp, last, mode)
        start = time.perf_counter()
        for _ in range(3):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            step(x)
        if cuda:
            torch.cuda.synchronize()
            peaks[kind] = _memory(mode, cuda, most=True) - before
        first[kind] = time.perf_counter() - start
        steps[kind] = step
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for i in range(args.steps):
        for kind, step in sorted(steps.items(), reverse=bool(i % 2)):
            start = time.perf_counter()
            step(x)
            if cuda:
                torch.cuda.synchronize()
            times[kind].append(time.perf_counter() - start)
    base = times[args.kinds[0]]
    found = dict(precision=precision, layout=layout, mode=mode, kinds={})
    for kind, seconds in times.items():
        ratios = sorted(a / b for a, b in strict_zip(seconds, base))
        found['kinds'][kind] = dict(
            ms=statistics.median(seconds) * 1e3,
            ratio=statistics.median(ratios),
            least=ratios[0],
            most=ratios[-1],
            mib=peaks.get(kind, 0),
            memory=peaks[kind] / peaks[args.kinds[0]] if peaks else 0,
            first=first[kind],
        )
    return found


def _memory(mode: str, cuda: bool, most: bool = False) -> float:
    """MiB on the GPU now, or at most since the last reset."""
    if not cuda:
        return 0.0
    if mode in ('graph', 'reduced'):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() / 2**20
    read = torch.cuda.max_memory_allocated if most else torch.cuda.memory_allocated
    return read() / 2**20


def _say(line: str) -> None:
    print(line, flush=True)


def run(args: Namespace, say: Callable[[str], Any] = _say) -> None:
    """Measures all settings; says each as it is found."""
    torch.backends.cudnn.benchmark = True
    made = models(args.neck, args.device)
    begun = time.perf_counter()
    for setting in settings(args):
        if time.perf_counter() - begun > args.limit:
            say(f'{setting}: left out, the time is over')
            continue
        try:
            found = measure(args, setting, made)
        except Exception as err:  # one setting must not cost the others
            say(f'{setting}: {type(err).__name__}: {err}')
            continue
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if args.out:
            with open(args.out, 'a') as file:
                file.write(json.dumps(found) + '\n')
        name = f'{setting[0]}, channels {setting[1]}, {setting[2]}'
        for kind, got in found['kinds'].items():
            say(
                f'{name:35} {kind:8} {got["ms"]:7.1f} ms  x{got["ratio"]:.3f} '
                f'({got["least"]:.3f} to {got["most"]:.3f})  {got["mib"]:6.0f} MiB '
                f'x{got["memory"]:.3f}  first steps {got["first"]:.0f} s'
            )
