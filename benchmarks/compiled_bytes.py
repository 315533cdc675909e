#!/usr/bin/env python
"""What compiled training moves through the memory of a GPU, counted without one.

ResNet-50 is traced and cut into forward and backward on a CPU; then torch's inductor makes its
kernels for an H100 that is not there, up to their code. What a kernel reads and writes is known
then. Between convolutions nothing but memory costs time, so the bytes there, against those of the
float model, foretell what quantization costs; how well a kernel uses the memory they do not tell.

Wants torch from 2.11 on with Triton, mmdet3d, and no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ['TRITON_INTERPRET'] = '1'  # or the kernels are not imported

import qat_gpu
import torch
import torch._inductor.compile_fx as inductor
import torch._inductor.scheduler as scheduler
from functorch.compile import min_cut_rematerialization_partition
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor

from mmdet3d_quant.core import fused

KINDS = ('float', 'ours', 'learned')
GPU = torch.device('cuda', 0)
EXAMPLE = """
examples:
  python benchmarks/compiled_bytes.py
  python benchmarks/compiled_bytes.py --precision float32 --code /tmp/kernels
"""


class Found(Exception):
    """Ends a compilation that has come as far as it shall."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--precision', choices=qat_gpu.TYPES, default='float16', help='%(default)s')
    parser.add_argument('--kinds', nargs='+', choices=KINDS, default=KINDS)
    parser.add_argument('--layout', choices=('first', 'last'), default='last', help='of channels')
    parser.add_argument('--cameras', type=int, default=24, help='%(default)s')
    parser.add_argument('--size', type=int, nargs=2, default=(256, 704), help='height width')
    parser.add_argument('--code', type=Path, help='folder to write the kernels to')
    return parser.parse_args()


def kept(forward: Any, outputs: int) -> float:
    """Gigabytes of what a forward graph makes for the backward pass."""
    *_, end = forward.graph.nodes
    made = {n for n in end.args[0] if isinstance(n, torch.fx.Node) and n.op != 'placeholder'}
    made -= {n for n in end.args[0][:outputs] if isinstance(n, torch.fx.Node)}
    tensors = [n.meta['val'] for n in made if isinstance(n.meta['val'], Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e9


def graphs(net: torch.nn.Module, x: Tensor, amp: torch.dtype | None) -> dict[str, Any]:
    """Forward and backward as torch hands them to inductor, and what is kept between them."""
    found: dict[str, Any] = {}

    def part(graph: Any, inputs: Any, **kwargs: Any) -> Any:
        inductor._recursive_joint_graph_passes(graph)
        both = min_cut_rematerialization_partition(graph, inputs, compiler='inductor', **kwargs)
        found['forward'], found['backward'] = both
        found['kept'] = kept(both[0], kwargs['num_fwd_outputs'])
        return both

    def stop(*_: Any) -> Any:
        raise Found

    def backend(graph: Any, inputs: Any) -> Any:
        return aot_module_simplified(
            graph, inputs, fw_compiler=stop, bw_compiler=stop, partition_fn=part,
            decompositions=select_decomp_table(),
        )  # fmt: skip

    torch._dynamo.reset()
    try:
        with torch.autocast('cpu', amp or torch.bfloat16, enabled=amp is not None):
            torch.compile(net, backend=backend, fullgraph=True)(x)
    except Exception:
        if 'forward' not in found:
            raise
    return found


def pretend() -> None:
    """Lets torch and Triton find an H100."""
    device = SimpleNamespace(
        name='NVIDIA H100', major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
        warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, shared_memory_per_block=48 << 10, gcnArchName='',
        shared_memory_per_block_optin=227 << 10, shared_memory_per_multiprocessor=228 << 10,
        L2_cache_size=50 << 20, is_integrated=False,
    )  # fmt: skip

    def give(value: Any) -> Any:
        return lambda *_, **__: value

    answers = dict(
        device_count=1, is_available=True, current_device=0, get_device_properties=device,
        get_device_capability=(9, 0), _lazy_init=None, get_rng_state=torch.zeros(1),
        set_rng_state=None, _exchange_device=0, _maybe_exchange_device=0, set_device=None,
        synchronize=None,
    )  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, give(value))
    for name in ('_cuda_getDevice', '_cuda_exchangeDevice', '_cuda_maybeExchangeDevice'):
        setattr(torch._C, name, give(0))
    fake_tensor.init_gpu_context = give(None)
    scheduler.has_triton = give(True)
    from torch._dynamo.device_interface import CudaInterface

    for name, value in dict(
        is_available=True, get_compute_capability=90, current_device=0, device_count=1,
        get_device_properties=device,
    ).items():  # fmt: skip
        setattr(CudaInterface, name, staticmethod(give(value)))
        setattr(CudaInterface.Worker, name, staticmethod(give(value)))
    from triton import runtime
    from triton.backends.compiler import GPUTarget

    target = GPUTarget('cuda', 90, 32)
    driver = dict(get_current_target=target, get_current_device=0, get_active_torch_device=GPU)
    driver = {name: staticmethod(give(value)) for name, value in driver.items()}
    runtime.driver.set_active(type('Driver', (), driver)())


def moved(graph: Any) -> Any:
    """Puts a traced graph on the GPU; returns the mode of its fake tensors."""
    modes = []

    def move(value: Any) -> Any:
        if not isinstance(value, fake_tensor.FakeTensor):
            return value
        modes.append(value.fake_mode)
        with value.fake_mode:
            shape = value.size(), value.stride()
            return torch.empty_strided(*shape, dtype=value.dtype, device=GPU)

    def place(argument: Any) -> Any:
        return GPU if isinstance(argument, torch.device) else argument

    for node in graph.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, place)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, place)
        if 'val' in node.meta:
            node.meta['val'] = torch.utils._pytree.tree_map(move, node.meta['val'])
    return modes[0]


def count(graph: Any, backward: bool, code: Path | None) -> dict[str, list[float]]:
    """Bytes and launches by what they are of."""
    found: dict[str, list[float]] = {}

    def stop(self: Any) -> Any:
        text = self.codegen()[0]
        if code is not None:
            code.parent.mkdir(parents=True, exist_ok=True)
            code.write_text(getattr(text, 'value', text))
        for node in self.scheduler.nodes:
            name = str(getattr(node.node, 'python_kernel_name', ''))
            size = node.get_read_write_buffers_sizes()
            kind = 'convolutions' if 'conv' in name else 'ours' if 'quant' in name else "torch's"
            if size:
                sums = found.setdefault(kind, [0, 0])
                sums[0], sums[1] = sums[0] + size, sums[1] + 1
        raise Found

    GraphLowering.compile_to_module = stop
    mode = moved(graph)
    inputs = [node.meta['val'] for node in graph.graph.nodes if node.op == 'placeholder']
    try:
        with V.set_fake_mode(mode), torch._guards.tracing(torch._guards.TracingContext(mode)):
            inductor.compile_fx_inner(graph, inputs, is_backward=backward)
    except Exception:
        if not found:
            raise
    return found


def main() -> None:
    args = parse_args()
    order = torch.channels_last if args.layout == 'last' else torch.contiguous_format
    x = torch.randn(args.cameras, 3, *args.size).contiguous(memory_format=order)
    console = Console()
    cut = {}
    fused.AVAILABLE = fused.INTERPRETED = False  # nothing shall be computed by kernels here
    made = qat_gpu.models(False, 'cpu')
    fused.AVAILABLE = fused.INTERPRETED = True  # as on a GPU
    for kind in args.kinds:
        with console.status(f'Tracing: {kind}'):
            net = qat_gpu.variant(kind, made, args.layout == 'last')
            cut[kind] = graphs(net, x, qat_gpu.TYPES[args.precision])
    del os.environ['TRITON_INTERPRET']
    pretend()
    torch._inductor.config.fx_graph_cache = False
    columns = 'forward, GB', 'backward, GB', 'of it ours', 'of float', 'kernels', 'kept, GB'
    table = Table('', *columns)
    base = 0.0
    for kind, both in cut.items():
        parts = []
        for name in ('forward', 'backward'):
            with console.status(f'Making kernels: {kind}, {name}'):
                file = args.code and args.code / f'{kind}_{name}.py'
                parts.append(count(both[name], name == 'backward', file))
        between = [{k: v for k, v in part.items() if k != 'convolutions'} for part in parts]
        size = [sum(v[0] for v in part.values()) / 1e9 for part in between]
        ours = sum(part.get('ours', [0, 0])[0] for part in between) / 1e9
        kernels = sum(v[1] for part in between for v in part.values())
        base = base or sum(size)
        row = [f'{s:.2f}' for s in (*size, ours, sum(size) / base)]
        table.add_row(kind, *row, str(int(kernels)), f'{both["kept"]:.2f}')
    console.print(table)
    console.print(
        f'{args.cameras}x3x{args.size[0]}x{args.size[1]}, {args.precision}, channels '
        f'{args.layout}, torch {torch.__version__}; convolutions are not counted'
    )


if __name__ == '__main__':
    sys.exit(main())
