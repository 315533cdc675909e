"""From a sparse encoder to a program, by walking its modules; nothing is run or patched."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Callable

import torch
from mmcv.ops import SparseSequential as MMCVSequential
from mmdet3d.models.layers import SparseBasicBlock
from torch import Tensor, nn

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.modes import require_calibrated
from mmdet3d_quant.core.spec import MIN_AMAX
from mmdet3d_quant.export.onnx import ExportError
from mmdet3d_quant.export.sparse.check import check
from mmdet3d_quant.export.sparse.precision import with_precisions
from mmdet3d_quant.export.sparse.program import (
    Add,
    Axes,
    Op,
    Program,
    Relu,
    Reshape,
    ScatterDense,
    SparseConv,
    Transpose,
    conv_grid,
)
from mmdet3d_quant.layers.fold import fold_bn
from mmdet3d_quant.layers.sparse import HAS_SPCONV2, OUTPUTS_LAST, SPARSE_CONVS

_CHAINS: tuple[type, ...] = (nn.Sequential, MMCVSequential)
if HAS_SPCONV2:
    from spconv.pytorch import SparseSequential

    _CHAINS = (*_CHAINS, SparseSequential)

#: Class whose `forward` an encoder has -> order of its axes. Another forward is another network.
_ORDERS = {'SparseEncoder': 'zyx', 'PortableSparseEncoder': 'zyx', 'BEVFusionSparseEncoder': 'xyz'}
_BLOCKS = ('SparseBasicBlock', 'QuantSparseBasicBlock')
#: Orders of encoder and file -> transposition after the scattering.
_TAILS: dict[tuple[str, str], Axes | None] = {
    ('xyz', 'xyz'): (0, 1, 4, 2, 3),  # (C, x, y, z) to (C, z, x, y)
    ('xyz', 'zyx'): (0, 1, 2, 4, 3),  # (C, z, y, x) to (C, z, x, y)
    ('zyx', 'zyx'): None,  # (C, z, y, x) as it is
}


def trace(
    encoder: nn.Module,
    order: str | None = None,
    quantized: bool = True,
    output_bound: int = 200_000,
) -> Program:
    """The program that computes what an encoder computes on one frame.

    Batch norm is folded into a copy of the encoder, and ReLUs after convolutions become part
    of them, as libspconv wants it.

    Args:
        encoder: A ``SparseEncoder`` of mmdet3d or a ``BEVFusionSparseEncoder``, quantized or not,
            of spconv 2 or mmcv. With ``return_middle_feats`` only the map is exported.
        order: Order of the axes in the file, ``'xyz'`` or ``'zyx'``; by default the encoder's.
            The map is the same, the columns of the coordinates are not.
        quantized: False leaves out the ranges: all of it is FP16.
        output_bound: Most voxels that a layer may have; libspconv reserves memory for them.

    Returns:
        The program, checked.

    Raises:
        ExportError: If the encoder has something that libspconv does not have; names it.
        UncalibratedError: If a quantizer has no range.
        ScnError: If the program is not one that libspconv computes; names the layer.
    """
    native = order_of(encoder)
    order = order or native
    if (native, order) not in _TAILS:
        raise ExportError(
            f'a {type(encoder).__name__} has its axes in the order {native}; '
            f'libspconv cannot make its map from {order!r}'
        )
    if quantized:
        require_calibrated(encoder)
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    fold_bn(encoder)
    tracer = _Tracer(tuple(encoder.sparse_shape), order != native, quantized, output_bound)
    x = tracer.walk('conv_input', encoder.conv_input, '0')
    for name, stage in encoder.encoder_layers.named_children():
        x = tracer.walk(f'encoder_layers.{name}', stage, x)
    x = tracer.walk('conv_out', encoder.conv_out, x)
    program = tracer.finish(x, order, _TAILS[native, order], encoder.in_channels)
    if any(op.input_range is not None for op in program.convs):
        program = with_precisions(program)
    check(program)
    return program


def order_of(encoder: nn.Module) -> str:
    """``'xyz'`` or ``'zyx'``: the axes of an encoder's grid and coordinates.

    Raises:
        ExportError: If it is none of the encoders that can be exported.
    """
    if _owner(encoder) not in _ORDERS:
        raise ExportError(
            f'{type(encoder).__name__} computes what {_owner(encoder)}.forward says; only '
            f'{", ".join(_ORDERS)} can be exported'
        )
    return _ORDERS[_owner(encoder)]


def _owner(module: nn.Module) -> str:
    """Name of the class that says what a module computes."""
    return next(t.__name__ for t in type(module).__mro__ if 'forward' in vars(t))


class _Tracer:
    """The operators so far, and the grid and voxels of each tensor."""

    def __init__(self, grid: Axes, flip: bool, quantized: bool, output_bound: int):
        self.flip = flip
        self.quantized = quantized
        self.output_bound = output_bound
        self.ops: list[Op] = []
        self.grids: dict[str, Axes] = {'0': self.axes(grid)}
        self.levels: dict[str, int] = {'0': 1}
        self.rulebooks: dict[str, tuple] = {}

    def axes(self, values: Any) -> Axes:
        """Values by axis, in the order of the file."""
        values = tuple(int(v) for v in values)
        return values[::-1] if self.flip else values

    def fresh(self) -> str:
        """Name of the next tensor: numbers, the input being 0."""
        return str(len(self.grids))

    def name(self, kind: type, stem: str) -> str:
        """Name of the next node of its kind."""
        return f'{stem}{sum(isinstance(op, kind) for op in self.ops)}'

    def emit(self, op: Op, grid: Axes, level: int) -> str:
        self.ops.append(op)
        self.grids[op.output], self.levels[op.output] = grid, level
        return op.output

    def walk(self, name: str, module: nn.Module, x: str) -> str:
        """Adds what a module does to tensor ``x``; returns what it makes."""
        for types, handle in _HANDLERS:
            if isinstance(module, types):
                return handle(self, name, module, x)
        hint = ' (batch norm is folded only into the convolution before it)'
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        raise ExportError(
            f'{name} is a {type(module).__name__}, which libspconv does not have{hint * norm}'
        )

    def finish(self, x: str, order: str, dims: Axes | None, channels: int) -> Program:
        """Adds the way to a dense map."""
        last = self.ops[-1]
        assert isinstance(last, SparseConv)
        shape = (1, len(last.bias), *self.grids[x])
        grid, level = self.grids[x], self.levels[x]
        op = ScatterDense('scatter0', (x,), self.fresh(), order, grid, shape)
        x = self.emit(op, grid, level)
        if dims is not None:
            shape = tuple(shape[d] for d in dims)
            x = self.emit(Transpose('transpose0', (x,), self.fresh(), dims), grid, level)
        shape = (1, shape[1] * shape[2], *shape[3:])
        x = self.emit(Reshape('reshape0', (x,), self.fresh(), shape), grid, level)
        return Program(tuple(self.ops), channels, x, shape)

    def rulebook(self, conv: nn.Module, x: str, geometry: tuple) -> str:
        """One name for layers with the same voxels and kernel, another for any other.

        The names are those of NVIDIA's exporter where it has some: `subm1` for the first stage.
        An `indice_key` may be missing and may be shared by layers that differ, so it is only
        taken where it names nothing else.
        """
        level = self.levels[x]
        stem = f'subm{level}' if conv.subm else conv.indice_key or f'spconv{level + 1}'
        key = (level, geometry)
        name, tries = stem, 1
        while self.rulebooks.setdefault(name, key) != key:
            tries += 1
            name = f'{stem}_{tries}'
        return name


def _chain(tracer: _Tracer, name: str, module: nn.Module, x: str) -> str:
    for child_name, child in module.named_children():
        x = tracer.walk(f'{name}.{child_name}', child, x)
    return x


def _conv(tracer: _Tracer, name: str, conv: nn.Module, x: str) -> str:
    _refuse_odd(name, conv)
    weight = conv.weight.detach()
    if isinstance(conv, OUTPUTS_LAST):
        weight = weight.permute(4, 0, 1, 2, 3)
    bias = conv.bias.detach() if conv.bias is not None else weight.new_zeros(len(weight))
    if tracer.flip:
        weight = weight.permute(0, 3, 2, 1, 4)
    kernel, dilation = tracer.axes(conv.kernel_size), tracer.axes(conv.dilation)
    stride, padding = tracer.axes(conv.stride), tracer.axes(conv.padding)
    if conv.subm:  # the outputs are the inputs, whatever the module's padding says
        padding = tuple(d * (k // 2) for d, k in strict_zip(dilation, kernel))
    grid, level = tracer.grids[x], tracer.levels[x]
    after = grid if conv.subm else conv_grid(grid, kernel, stride, padding, dilation)
    input_range, weight_ranges = _ranges(tracer, name, conv)
    op = SparseConv(
        name=tracer.name(SparseConv, 'conv'),
        inputs=(x,),
        output=tracer.fresh(),
        weight=_half(f'{name}.weight', weight),
        bias=_half(f'{name}.bias', bias),
        subm=bool(conv.subm),
        stride=stride,
        padding=padding,
        dilation=dilation,
        grid=grid,
        output_grid=after,
        rulebook=tracer.rulebook(conv, x, (kernel, stride, padding, dilation)),
        input_range=input_range,
        weight_ranges=weight_ranges,
        output_bound=tracer.output_bound,
        layer=name,
    )
    return tracer.emit(op, after, level + (not conv.subm))


def _refuse_odd(name: str, conv: nn.Module) -> None:
    problems = {
        f'{conv.ndim} dimensions': conv.ndim != 3,
        'groups': conv.groups != 1,
        'a transposed convolution': conv.transposed,
        'an inverse convolution': conv.inverse,
        'a fused activation': 'None' not in str(getattr(conv, 'act_type', 'None')),
    }
    found = [what for what, is_so in problems.items() if is_so]
    if found:
        raise ExportError(f'{name} has what cannot be exported to libspconv: {", ".join(found)}')


def _ranges(
    tracer: _Tracer, name: str, conv: nn.Module
) -> tuple[float | None, tuple[float, ...] | None]:
    """Ranges of input and weight of a quantized layer, of the weight alone of a float one."""
    of_input = getattr(conv, '_input_quantizer', None)
    of_weight = getattr(conv, '_weight_quantizer', None)
    if not tracer.quantized or of_input is None or of_weight is None:
        return None, None
    if (of_input.float_reason is None) != (of_weight.float_reason is None):
        raise ExportError(f'{name} quantizes only one of input and weight: libspconv cannot')
    if of_input.float_reason is not None:
        return None, _floats(conv.weight_amax())
    if {of_input.spec.num_bits, of_weight.spec.num_bits} != {8}:
        raise ExportError(f'{name} has {of_weight.spec.num_bits} bits; libspconv has INT8')
    return _floats(of_input.amax)[0], _floats(of_weight.amax)


def _floats(amax: Tensor) -> tuple[float, ...]:
    return tuple(amax.float().flatten().clamp(min=MIN_AMAX).tolist())


def _half(name: str, values: Tensor) -> Tensor:
    half = values.half().contiguous()
    if not bool(torch.isfinite(half).all()):
        raise ExportError(
            f'{name}, batch norm folded, has values up to {values.abs().max():g}; '
            'the file holds FP16, which ends at 65504'
        )
    return half


def _relu(tracer: _Tracer, name: str, module: nn.Module, x: str) -> str:
    last = tracer.ops[-1] if tracer.ops else None
    if isinstance(last, SparseConv) and last.output == x:
        tracer.ops[-1] = replace(last, relu=True)
        return x
    op = Relu(tracer.name(Relu, 'relu'), (x,), tracer.fresh())
    return tracer.emit(op, tracer.grids[x], tracer.levels[x])


def _block(tracer: _Tracer, name: str, block: nn.Module, x: str) -> str:
    if _owner(block) not in _BLOCKS:
        raise ExportError(
            f'{name} computes what {_owner(block)}.forward says; only '
            f'{" and ".join(_BLOCKS)} can be exported'
        )
    y = tracer.walk(f'{name}.conv1', block.conv1, x)
    y = tracer.walk(f'{name}.{block.norm1_name}', block.norm1, y)
    y = tracer.walk(f'{name}.relu', block.relu, y)
    y = tracer.walk(f'{name}.conv2', block.conv2, y)
    y = tracer.walk(f'{name}.{block.norm2_name}', block.norm2, y)
    if block.downsample is not None:
        x = tracer.walk(f'{name}.downsample', block.downsample, x)
    limit = None
    if tracer.quantized and hasattr(block, 'add'):
        amax = block.add._input_quantizer.amax
        limit = None if amax is None else _floats(amax)[0]
    op = Add(tracer.name(Add, 'add'), (y, x), tracer.fresh(), (limit, limit), layer=f'{name}.add')
    y = tracer.emit(op, tracer.grids[y], tracer.levels[y])
    return tracer.walk(f'{name}.relu', block.relu, y)


_HANDLERS: tuple[tuple[tuple[type, ...], Callable[[_Tracer, str, Any, str], str]], ...] = (
    ((SparseBasicBlock,), _block),
    (SPARSE_CONVS, _conv),
    (_CHAINS, _chain),
    ((nn.ReLU,), _relu),
    ((nn.Identity,), lambda tracer, name, module, x: x),
)
