#!/usr/bin/env python
"""Which layer runs in what: small nets, quantized and exported for every target, and compiled.

Each net has a quantized layer, the one in question, and a quantized layer. NVIDIA's compiler
(TensorRT for RTX, no GPU; docs/compiler.md) tells the types of every kernel, OpenVINO that of every
layer on this CPU. About 5 minutes. `make pages` writes docs/support.md from the result.

Example:
    python benchmarks/support_matrix.py --out docs/support.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import mmdet3d_quant as mq  # noqa: E402
from mmdet3d_quant.doctor.facts import processor  # noqa: E402
from mmdet3d_quant.engines import OpenVINO  # noqa: E402
from mmdet3d_quant.engines.tensorrt_rtx import compile_onnx  # noqa: E402
from mmdet3d_quant.engines.tensorrt_rtx.record import PRODUCTS  # noqa: E402
from mmdet3d_quant.models.convert import quantize  # noqa: E402

#: One target for all that get the same file; NVIDIA's compiler reads those of TensorRT.
TARGETS = ('tensorrt8', 'tensorrt10', 'openvino')
SM = 'SM86'
CHANNELS = 32
REFUSED = 'refused'
TYPES = dict(Int8='INT8', Half='FP16', Float='FP32', i8='INT8', u8='INT8', f32='FP32', f16='FP16')
TYPES.update(bf16='BF16', i32='INT32', i64='INT64', Int32='INT32', Int64='INT64', Bool='BOOL')


class Do(nn.Module):
    """A function of one map as a module."""

    def __init__(self, function: Callable[..., Any], *others: nn.Module) -> None:
        super().__init__()
        self.function, self.others = function, nn.ModuleList(others)

    def forward(self, x):
        return self.function(x, *(other(x) for other in self.others))


class Net(nn.Module):
    """A quantized layer, the part in question, and a quantized layer."""

    def __init__(self, part: nn.Module, dims: int) -> None:
        super().__init__()
        self.stem, self.part, self.end = _layer(dims), part, _layer(dims)

    def forward(self, x):
        return self.end(self.part(torch.relu(self.stem(x))))


def _layer(dims: int) -> nn.Module:
    if dims == 0:
        return nn.Linear(CHANNELS, CHANNELS)
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return kind(CHANNELS, CHANNELS, 3, padding=1)


@dataclass(frozen=True)
class Case:
    """What is asked: a module, the operators of the file that are it, dimensions of its map."""

    make: Callable[[], nn.Module]
    ops: tuple[str, ...]
    dims: int = 2


C = CHANNELS
CONV = ('Conv',)
CASES = {
    'Conv2d, 3x3': Case(lambda: nn.Conv2d(C, C, 3, padding=1), CONV),
    'Conv2d, 1x1': Case(lambda: nn.Conv2d(C, C, 1), CONV),
    'Conv2d, stride 2': Case(lambda: nn.Conv2d(C, C, 3, 2, 1), CONV),
    'Conv2d, dilation 2': Case(lambda: nn.Conv2d(C, C, 3, 1, 2, 2), CONV),
    'Conv2d, 4 groups': Case(lambda: nn.Conv2d(C, C, 3, padding=1, groups=4), CONV),
    'Conv2d, depthwise': Case(lambda: nn.Conv2d(C, C, 3, padding=1, groups=C), CONV),
    'Conv1d': Case(lambda: nn.Conv1d(C, C, 3, padding=1), CONV, 1),
    'Conv3d': Case(lambda: nn.Conv3d(C, C, 3, padding=1), CONV, 3),
    'ConvTranspose2d, kernel = stride': Case(
        lambda: nn.ConvTranspose2d(C, C, 2, 2), ('Conv', 'ConvTranspose')
    ),
    'ConvTranspose2d, kernel > stride': Case(
        lambda: nn.ConvTranspose2d(C, C, 4, 2, 1), ('ConvTranspose',)
    ),
    'Linear': Case(lambda: nn.Linear(C, C), ('MatMul', 'Gemm'), 0),
    'residual add': Case(lambda: Do(lambda x, y: x + y, _layer(2)), ('Add',)),
    'concat': Case(lambda: Do(lambda x, y, z: _cut(torch.cat([y, z], 1)), _layer(2), _layer(2)),
                   ('Concat',)),
    'ReLU': Case(lambda: nn.Sequential(_layer(2), nn.ReLU()), ('Relu',)),
    'SiLU': Case(lambda: nn.Sequential(_layer(2), nn.SiLU()), ('Sigmoid', 'Mul')),
    'GELU': Case(lambda: nn.Sequential(_layer(2), nn.GELU()), ('Erf', 'Mul')),
    'max pooling': Case(lambda: nn.MaxPool2d(2), ('MaxPool',)),
    'average pooling': Case(lambda: nn.AvgPool2d(2), ('AveragePool',)),
    'upsampling, nearest': Case(lambda: nn.Upsample(scale_factor=2), ('Resize',)),
    'upsampling, bilinear': Case(
        lambda: nn.Upsample(scale_factor=2, mode='bilinear', align_corners=False), ('Resize',)
    ),
    'layer norm': Case(lambda: nn.LayerNorm(C), ('LayerNormalization',), 0),
    'softmax': Case(lambda: nn.Softmax(-1), ('Softmax',), 0),
    'product of two activations': Case(
        lambda: Do(lambda x: x @ (x.transpose(1, 2) @ x)), ('MatMul',), 0
    ),
}  # fmt: skip
SHAPES = {0: (1, 64, C), 1: (1, C, 64), 2: (1, C, 16, 16), 3: (1, C, 8, 8, 8)}


def _cut(x: torch.Tensor) -> torch.Tensor:
    return x[:, :C]


def study(name: str, folder: Path) -> dict[str, dict[str, list[str]]]:
    """Builds, exports and compiles one case.

    Returns:
        Dict by target, then by ``INT8`` and ``float`` (the file with Q/DQ and the one without), of
        the types in which the part runs.
    """
    case = CASES[name]
    torch.manual_seed(0)
    net, x = Net(case.make(), case.dims).eval(), torch.randn(SHAPES[case.dims])
    quantize(net, True, [[x]])
    mq.calibrate(net, [x], 'max')
    found: dict[str, dict[str, list[str]]] = {}
    for target in TARGETS:
        found[target] = {}
        for kind in ('INT8', 'float'):
            path = folder / 'net.onnx'
            mq.export.export_onnx(
                net, [x], path, ['x'], ['y'], quantized=kind == 'INT8', target=target
            )
            ran = in_openvino(path) if target == 'openvino' else in_tensorrt(path)
            found[target][kind] = of_part(ran, case.ops)
    return found


def of_part(ran: dict[str, str], ops: tuple[str, ...]) -> list[str]:
    """Picks the types of the part in question, each once; empty if it is not a layer of its own."""
    if REFUSED in ran:
        return [f'refused: {ran[REFUSED]}']
    paths = {name: name.split('/') for name in ran}
    own = [n for n, path in paths.items() if 'part' in path and _has(path, ops)]
    return sorted({TYPES.get(ran[name], ran[name]) for name in own})


def _has(path: list[str], ops: tuple[str, ...]) -> bool:
    return any(step.partition('_')[0] in ops for step in path)


def in_tensorrt(path: Path) -> dict[str, str]:
    """Types by node, of NVIDIA's compiler: in which a product runs, which another kernel writes."""
    told = compile_onnx(path, [SM])[SM]
    if not told.accepted:
        return {REFUSED: told.error}
    kernels = {name: k.outputs[0] for k in told.layers if k.outputs for name in k.made_of}
    return {**kernels, **{p.name: p.runs_in for p in told.products if p.runs_in}}


def in_openvino(path: Path) -> dict[str, str]:
    """Types by node in which OpenVINO runs them on this CPU."""
    found = {}
    for op in OpenVINO(path)._compiled.get_runtime_model().get_ops():
        info = {key: value.astype(str) for key, value in op.get_rt_info().items()}
        for name in info.get('originalLayersNames', '').split(','):
            found[name] = info['runtimePrecision']
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, help='write the result here, as JSON')
    parser.add_argument('--only', nargs='*', help='names of cases')
    args = parser.parse_args()
    result: dict[str, Any] = dict(
        compiler=version('tensorrt-rtx-cu12-bindings'),
        sm=SM,
        openvino=version('openvino'),
        instructions=processor()['instructions'],
        products=[name for name, case in CASES.items() if set(case.ops) <= set(PRODUCTS)],
        cases={},
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only or CASES:
            result['cases'][name] = study(name, Path(folder))
            print(name, json.dumps(result['cases'][name]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
