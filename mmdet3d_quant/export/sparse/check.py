"""Check that its runtime computes a program as intended."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Callable

from mmdet3d_quant.export.sparse.arithmetic import LIBSPCONV, Arithmetic
from mmdet3d_quant.export.sparse.program import (
    PRECISIONS,
    TRANSPOSITIONS,
    Add,
    Axes,
    Op,
    Program,
    Relu,
    Reshape,
    ScatterDense,
    ScnError,
    SparseConv,
    Transpose,
    conv_grid,
)


@dataclass(frozen=True)
class _Sparse:
    """A sparse tensor, as the check sees it: number of its voxel set, grid, channels."""

    voxels: int
    grid: Axes
    channels: int


@dataclass
class _Walk:
    """State of the check: the tensors and rulebooks of the operators so far."""

    tensors: dict[str, _Sparse | Axes]
    rulebooks: dict[str, tuple] = field(default_factory=dict)
    sets: int = 0
    arithmetic: Arithmetic = LIBSPCONV

    def sparse(self, name: str) -> _Sparse:
        known = self.tensors[name]
        if not isinstance(known, _Sparse):
            raise ScnError(f'tensor {name} is dense, a sparse one is expected')
        return known

    def dense(self, name: str) -> Axes:
        known = self.tensors[name]
        if isinstance(known, _Sparse):
            raise ScnError(f'tensor {name} is sparse; scatter it first')
        return known


def check(program: Program) -> None:
    """Checks that its runtime computes a program as intended.

    Raises:
        ScnError: With the node that is wrong.
    """
    if not program.convs:
        raise ScnError('there is no SparseConvolution')
    first = _Sparse(0, program.grid, program.channels)
    walk = _Walk({program.input: first}, arithmetic=program.arithmetic)
    for op in program.ops:
        for name in op.inputs:
            if name not in walk.tensors:
                raise ScnError(f'{op.name} reads tensor {name!r}, which nothing makes before')
        if op.output in walk.tensors:
            raise ScnError(f'{op.name} makes tensor {op.output!r} again')
        try:
            walk.tensors[op.output] = _CHECKS[type(op)](op, walk)
        except ScnError as err:
            raise ScnError(f'{op.name}{_where(op)}: {err}') from None
    if program.output not in walk.tensors:
        raise ScnError(f'the output {program.output!r} is made by no operator')
    if walk.dense(program.output) != program.output_shape:
        raise ScnError(
            f'the output has shape {walk.tensors[program.output]}, not {program.output_shape}'
        )


def _where(op: Op) -> str:
    layer = getattr(op, 'layer', '')
    return f' ({layer})' if layer else ''


def _check_conv(op: SparseConv, walk: _Walk) -> _Sparse:
    x = walk.sparse(op.inputs[0])
    out, inner = op.weight.shape[0], op.weight.shape[-1]
    if op.weight.dim() != 5 or inner != x.channels:
        raise ScnError(
            f'weight {tuple(op.weight.shape)} on {x.channels} channels; expected '
            '(out, k0, k1, k2, in)'
        )
    if tuple(op.bias.shape) != (out,):
        raise ScnError(f'bias {tuple(op.bias.shape)} for {out} channels')
    if op.grid != x.grid:
        raise ScnError(f'input_spatial_shape {op.grid}, but its input has {x.grid}')
    _check_kernel(op.kernel, walk.arithmetic)
    if op.subm and (set(op.stride) != {1} or any(k % 2 == 0 for k in op.kernel)):
        raise ScnError('a submanifold convolution needs stride 1 and odd kernels')
    grid = x.grid
    if not op.subm:
        grid = conv_grid(x.grid, op.kernel, op.stride, op.padding, op.dilation)
    if op.output_grid != grid:
        raise ScnError(f'output_spatial_shape {op.output_grid}, but it must be {grid}')
    _check_precision(op.precision, op.output_precision)
    if op.precision == 'int8':
        _check_range(op.input_range)
    if op.weight_ranges is not None or op.precision == 'int8':
        if len(op.weight_ranges or ()) != out:
            raise ScnError(f'{len(op.weight_ranges or ())} weight ranges for {out} channels')
        for limit in op.weight_ranges or ():
            _check_range(limit)
    key = (x.voxels, op.subm, op.kernel, op.stride, op.padding, op.dilation)
    if op.rulebook and walk.rulebooks.setdefault(op.rulebook, key) != key:
        raise ScnError(
            f'rulebook {op.rulebook!r} is already that of other voxels or another kernel'
        )
    if op.subm:
        return _Sparse(x.voxels, grid, out)
    walk.sets += 1
    return _Sparse(walk.sets, grid, out)


def _check_kernel(kernel: Axes, arithmetic: Arithmetic) -> None:
    places = math.prod(kernel)
    if places == 1 and arithmetic.ones:
        raise ScnError(
            f'kernels of 1x1x1 are {arithmetic.ones}; a submanifold kernel of 3x3x3 that is zero '
            'but for its centre computes the same, if the stride is 1'
        )
    if arithmetic.places and places > arithmetic.places:
        raise ScnError(
            f'a kernel of {"x".join(map(str, kernel))} has {places} places, and '
            f'{arithmetic.name} has at most {arithmetic.places}: train with 3x3x3 and 1x1x3 kernels'
        )


def _check_add(op: Add, walk: _Walk) -> _Sparse:
    a, b = (walk.sparse(name) for name in op.inputs)
    if a != b:
        raise ScnError(
            f'its inputs differ: {a.channels} channels on {a.grid} and {b.channels} on '
            f'{b.grid}, or other voxels'
        )
    _check_precision(op.precision, op.output_precision)
    if op.precision == 'int8':
        for limit in op.ranges:
            _check_range(limit)
    return a


def _check_scatter(op: ScatterDense, walk: _Walk) -> Axes:
    x = walk.sparse(op.inputs[0])
    if op.order not in TRANSPOSITIONS:
        raise ScnError(f"format {op.order!r}; libspconv knows 'xyz' and 'zyx'")
    if op.grid != x.grid or op.shape != (1, x.channels, *x.grid):
        raise ScnError(
            f'grid {op.grid} and shape {op.shape} do not fit its input, {x.channels} '
            f'channels on {x.grid}'
        )
    return op.shape


def _check_transpose(op: Transpose, walk: _Walk) -> Axes:
    shape = walk.dense(op.inputs[0])
    if sorted(op.dims) != list(range(len(shape))):
        raise ScnError(f'dims {op.dims} of a tensor of shape {shape}')
    if op.dims not in TRANSPOSITIONS.values():
        raise ScnError(
            f'libspconv has no transposition {op.dims}, only '
            f'{" and ".join(map(str, TRANSPOSITIONS.values()))}'
        )
    return tuple(shape[d] for d in op.dims)


def _check_reshape(op: Reshape, walk: _Walk) -> Axes:
    shape = walk.dense(op.inputs[0])
    if math.prod(shape) != math.prod(op.dims):
        raise ScnError(f'{shape} does not become {op.dims}')
    return op.dims


def _check_precision(*precisions: str) -> None:
    odd = [p for p in precisions if p not in PRECISIONS]
    if odd:
        raise ScnError(f'precision {odd[0]!r}; expected one of {", ".join(PRECISIONS)}')


def _check_range(limit: float | None) -> None:
    if limit is None or not 0 < limit < math.inf:
        raise ScnError(f'INT8 needs ranges that are finite and positive, got {limit}')


_CHECKS: dict[type, Callable] = {
    SparseConv: _check_conv,
    Add: _check_add,
    Relu: lambda op, walk: walk.sparse(op.inputs[0]),
    ScatterDense: _check_scatter,
    Transpose: _check_transpose,
    Reshape: _check_reshape,
}
