"""From the modules of an encoder to operators, one function per kind of module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable

from mmcv.ops import SparseSequential as MMCVSequential
from mmdet3d.models.layers import SparseBasicBlock
from torch import Tensor, nn

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.formats import INT8, MIN_AMAX
from mmdet3d_quant.export.onnx import ExportError
from mmdet3d_quant.export.sparse.builder import ProgramBuilder
from mmdet3d_quant.export.sparse.program import Add, Relu, SparseConv, conv_grid
from mmdet3d_quant.export.weight_scales import raised
from mmdet3d_quant.layers.sparse import HAS_SPCONV2, OUTPUTS_LAST, SPARSE_CONVS

_CHAINS: tuple[type, ...] = (nn.Sequential, MMCVSequential)
if HAS_SPCONV2:
    from spconv.pytorch import SparseSequential

    _CHAINS = (*_CHAINS, SparseSequential)

_BLOCKS = ('SparseBasicBlock', 'QuantSparseBasicBlock')


def walk(builder: ProgramBuilder, name: str, module: nn.Module, x: str) -> str:
    """Adds the operators of a module for tensor ``x``; returns the name of its output."""
    for types, handle in _HANDLERS:
        if isinstance(module, types):
            return handle(builder, name, module, x)
    kind = type(module).__name__
    if name in builder.kept:
        raise ExportError(
            f'{name} is a {kind} that cannot be folded: {builder.kept[name]}. Train with each '
            'batch norm right behind a convolution of its own'
        )
    raise ExportError(
        f'{name} is a {kind}, which {builder.runtime} does not have: train with convolutions, '
        'batch norm behind them, ReLU and basic blocks only'
    )


def owner(module: nn.Module) -> str:
    """Finds the name of the class that defines a module's computation."""
    return next(t.__name__ for t in type(module).__mro__ if 'forward' in vars(t))


def _chain(builder: ProgramBuilder, name: str, module: nn.Module, x: str) -> str:
    for child_name, child in module.named_children():
        x = walk(builder, f'{name}.{child_name}', child, x)
    return x


def _conv(builder: ProgramBuilder, name: str, conv: nn.Module, x: str) -> str:
    _refuse_odd(builder.runtime, name, conv)
    weight = conv.weight.detach()
    if isinstance(conv, OUTPUTS_LAST):
        weight = weight.permute(4, 0, 1, 2, 3)
    bias = conv.bias.detach() if conv.bias is not None else weight.new_zeros(len(weight))
    if builder.flip:
        weight = weight.permute(0, 3, 2, 1, 4)
    kernel, dilation = builder.axes(conv.kernel_size), builder.axes(conv.dilation)
    stride, padding = builder.axes(conv.stride), builder.axes(conv.padding)
    if conv.subm:  # the outputs are the inputs, whatever the module's padding says
        padding = tuple(d * (k // 2) for d, k in strict_zip(dilation, kernel))
    grid, level = builder.grids[x], builder.levels[x]
    after = grid if conv.subm else conv_grid(grid, kernel, stride, padding, dilation)
    input_range, weight_ranges = _ranges(builder, name, conv)
    op = SparseConv(
        name=builder.name(SparseConv, 'conv'),
        inputs=(x,),
        output=builder.fresh(),
        weight=_half(f'{name}.weight', weight),
        bias=_half(f'{name}.bias', bias),
        subm=bool(conv.subm),
        stride=stride,
        padding=padding,
        dilation=dilation,
        grid=grid,
        output_grid=after,
        rulebook=builder.rulebook(conv, x, (kernel, stride, padding, dilation)),
        input_range=input_range,
        weight_ranges=weight_ranges,
        output_bound=builder.output_bound,
        layer=name,
    )
    return builder.emit(op, after, level + (not conv.subm))


def _refuse_odd(runtime: str, name: str, conv: nn.Module) -> None:
    problems = {
        f'{conv.ndim} dimensions': conv.ndim != 3,
        'groups': conv.groups != 1,
        'a transposed convolution': conv.transposed,
        'an inverse convolution': conv.inverse,
        'a fused activation': 'None' not in str(getattr(conv, 'act_type', 'None')),
    }
    reasons = [what for what, is_so in problems.items() if is_so]
    if reasons:
        raise ExportError(
            f'{name} has what {runtime} does not have: {", ".join(reasons)}; train it without'
        )


def _ranges(
    builder: ProgramBuilder, name: str, conv: nn.Module
) -> tuple[float | None, tuple[float, ...] | None]:
    """Reads the ranges of input and weight of a quantized layer, of the weight of a float one."""
    of_input = getattr(conv, '_input_quantizer', None)
    of_weight = getattr(conv, '_weight_quantizer', None)
    if not builder.quantized or of_input is None or of_weight is None:
        return None, None
    if (of_input.float_reason is None) != (of_weight.float_reason is None):
        raise ExportError(
            f'{name} quantizes only one of input and weight, which {builder.runtime} cannot: keep '
            'both float (skip) or none'
        )
    if of_input.float_reason is not None:
        return None, _floats(raised(conv, conv.weight_amax()))
    for quantizer in (of_input, of_weight):
        if quantizer.spec.format != INT8:
            raise ExportError(
                f'{name} has {quantizer.spec.format.name}; {builder.runtime} has int8: set '
                f'its format to {INT8.name} and calibrate again'
            )
    return _floats(of_input.amax)[0], _floats(of_weight.amax)


def _floats(amax: Tensor) -> tuple[float, ...]:
    return tuple(amax.float().flatten().clamp(min=MIN_AMAX).tolist())


def _half(name: str, values: Tensor) -> Tensor:
    half = values.half().contiguous()
    wrong = [i for i, of_channel in enumerate(half) if not bool(of_channel.isfinite().all())]
    if wrong:
        more = f', and {len(wrong) - 1} more channel(s) are as large' if wrong[1:] else ''
        raise ExportError(
            f'{name}, batch norm folded, reaches {values[wrong[0]].abs().max():g} in channel '
            f'{wrong[0]}{more}; the file holds FP16, which ends at 65504. See whether the '
            'running_var of its batch norm is next to zero there, or the weight diverged; train '
            'on with weight decay, or from an earlier checkpoint'
        )
    return half


def _relu(builder: ProgramBuilder, name: str, module: nn.Module, x: str) -> str:
    last = builder.ops[-1] if builder.ops else None
    if isinstance(last, SparseConv) and last.output == x:
        builder.ops[-1] = replace(last, relu=True)
        return x
    op = Relu(builder.name(Relu, 'relu'), (x,), builder.fresh())
    return builder.emit(op, builder.grids[x], builder.levels[x])


def _block(builder: ProgramBuilder, name: str, block: nn.Module, x: str) -> str:
    if owner(block) not in _BLOCKS:
        raise ExportError(
            f'{name} computes what {owner(block)}.forward says; only '
            f'{" and ".join(_BLOCKS)} can be exported'
        )
    y = walk(builder, f'{name}.conv1', block.conv1, x)
    y = walk(builder, f'{name}.{block.norm1_name}', block.norm1, y)
    y = walk(builder, f'{name}.relu', block.relu, y)
    y = walk(builder, f'{name}.conv2', block.conv2, y)
    y = walk(builder, f'{name}.{block.norm2_name}', block.norm2, y)
    if block.downsample is not None:
        x = walk(builder, f'{name}.downsample', block.downsample, x)
    limit = None
    if builder.quantized and hasattr(block, 'add'):
        amax = block.add._input_quantizer.amax
        limit = None if amax is None else _floats(amax)[0]
    op = Add(builder.name(Add, 'add'), (y, x), builder.fresh(), (limit, limit), layer=f'{name}.add')
    y = builder.emit(op, builder.grids[y], builder.levels[y])
    return walk(builder, f'{name}.relu', block.relu, y)


_HANDLERS: tuple[tuple[tuple[type, ...], Callable[[ProgramBuilder, str, Any, str], str]], ...] = (
    ((SparseBasicBlock,), _block),
    (SPARSE_CONVS, _conv),
    (_CHAINS, _chain),
    ((nn.ReLU,), _relu),
    ((nn.Identity,), lambda builder, name, module, x: x),
)
