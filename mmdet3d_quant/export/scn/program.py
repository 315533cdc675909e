"""A sparse convolution network as plain data: what a `lidar.backbone.*.onnx` says.

The operators are those of libspconv, the engine of NVIDIA's Lidar_AI_Solution, and their
fields are what its parser reads (`libraries/3DSparseConvolution/src/onnx-parser.cpp`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Callable

from torch import Tensor

Axes = tuple[int, ...]

#: Order of the axes -> dims of the only transposition that libspconv fuses into the scattering;
#: without one, only 'zyx' can be scattered.
TRANSPOSITIONS: dict[str, Axes] = {'xyz': (0, 1, 4, 2, 3), 'zyx': (0, 1, 2, 4, 3)}
PRECISIONS = ('fp16', 'int8')


class ScnError(ValueError):
    """A network that libspconv would refuse or compute wrongly, or a file that holds none."""


@dataclass(frozen=True, eq=False)
class SparseConv:
    """A sparse convolution with bias, and a ReLU where one follows.

    Attributes:
        name: Name of the node.
        inputs: Name of the tensor read.
        output: Name of the tensor made.
        weight: float16 (out, k0, k1, k2, in), with the kernel's axes in the order of the grid's.
        bias: float16 (out,).
        subm: Whether outputs are at the input's voxels only.
        stride: By axis; so are ``padding`` and ``dilation``.
        grid: Number of cells along each axis before.
        output_grid: The same after.
        relu: Whether negative outputs become 0.
        rulebook: Layers of one name share their search for neighbours.
        input_range: Largest absolute input that INT8 represents; None if not known.
        weight_ranges: The same of the weight, by output channel.
        precision: Of the arithmetic, ``'fp16'`` or ``'int8'``.
        output_precision: Of the tensor made.
        output_bound: Most voxels that it may have.
        layer: Where it comes from, for people.
    """

    name: str
    inputs: tuple[str]
    output: str
    weight: Tensor
    bias: Tensor
    subm: bool
    stride: Axes
    padding: Axes
    dilation: Axes
    grid: Axes
    output_grid: Axes
    relu: bool = False
    rulebook: str = ''
    input_range: float | None = None
    weight_ranges: tuple[float, ...] | None = None
    precision: str = 'fp16'
    output_precision: str = 'fp16'
    output_bound: int = 200_000
    layer: str = ''

    @property
    def kernel(self) -> Axes:
        """Size of the kernel along each axis."""
        return tuple(self.weight.shape[1:4])


@dataclass(frozen=True)
class Add:
    """Sum of two sparse tensors with the same voxels; ``ranges`` are those of its inputs."""

    name: str
    inputs: tuple[str, str]
    output: str
    ranges: tuple[float | None, float | None] = (None, None)
    precision: str = 'fp16'
    output_precision: str = 'fp16'
    layer: str = ''


@dataclass(frozen=True)
class Relu:
    """A ReLU that is not part of a convolution; libspconv fuses it into the Add before it."""

    name: str
    inputs: tuple[str]
    output: str


@dataclass(frozen=True)
class ScatterDense:
    """A sparse tensor as (1, C, *grid), zero where no voxel is; ``order`` names the axes."""

    name: str
    inputs: tuple[str]
    output: str
    order: str
    grid: Axes
    shape: Axes


@dataclass(frozen=True)
class Transpose:
    """A dense tensor with its axes permuted."""

    name: str
    inputs: tuple[str]
    output: str
    dims: Axes


@dataclass(frozen=True)
class Reshape:
    """A dense tensor in another shape."""

    name: str
    inputs: tuple[str]
    output: str
    dims: Axes


Op = SparseConv | Add | Relu | ScatterDense | Transpose | Reshape


@dataclass(frozen=True)
class Program:
    """A network for one frame.

    Attributes:
        ops: Operators in the order of execution.
        channels: Channels of a voxel.
        output: Name of the map.
        output_shape: Its shape, (1, C, H, W).
        input: Name of the voxels.
    """

    ops: tuple[Op, ...]
    channels: int
    output: str
    output_shape: Axes
    input: str = '0'

    @property
    def convs(self) -> tuple[SparseConv, ...]:
        """The convolutions."""
        return tuple(op for op in self.ops if isinstance(op, SparseConv))

    @property
    def grid(self) -> Axes:
        """Number of cells along each axis of the input."""
        return self.convs[0].grid

    @property
    def order(self) -> str:
        """``'xyz'`` or ``'zyx'``: the axes of grid and coordinates."""
        return next(op.order for op in self.ops if isinstance(op, ScatterDense))

    def readers(self, tensor: str) -> list[Op]:
        """Operators that read a tensor, those behind a ReLU included."""
        found: list[Op] = []
        for op in self.ops:
            if tensor in op.inputs:
                found.extend(self.readers(op.output) if isinstance(op, Relu) else [op])
        return found

    def ranges(self, tensor: str) -> set[float]:
        """Ranges with which INT8 readers read a tensor; libspconv knows one per tensor."""
        found = set()
        for op in self.readers(tensor):
            if isinstance(op, SparseConv) and op.precision == 'int8':
                found.add(op.input_range)
            elif isinstance(op, Add) and op.precision == 'int8':
                read = [
                    r
                    for r, name in zip(op.ranges, op.inputs, strict=True)
                    if name == tensor or name in self._rectified(tensor)
                ]
                found.update(read)
        return {r for r in found if r is not None}

    def _rectified(self, tensor: str) -> set[str]:
        return {op.output for op in self.ops if isinstance(op, Relu) and tensor in op.inputs}


def conflicts(program: Program) -> dict[str, list[float]]:
    """Tensors that INT8 layers read with unequal ranges, and these."""
    found = {op.output: sorted(program.ranges(op.output)) for op in program.ops}
    return {tensor: ranges for tensor, ranges in found.items() if len(ranges) > 1}


def conv_grid(grid: Axes, kernel: Axes, stride: Axes, padding: Axes, dilation: Axes) -> Axes:
    """Number of cells along each axis after a strided convolution."""
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(grid, kernel, stride, padding, dilation, strict=True)
    )


@dataclass(frozen=True)
class _Sparse:
    """What is known of a sparse tensor: which voxels (a number), their grid, their channels."""

    voxels: int
    grid: Axes
    channels: int


@dataclass
class _Walk:
    """What is known of each tensor while a program is checked."""

    tensors: dict[str, _Sparse | Axes]
    rulebooks: dict[str, tuple] = field(default_factory=dict)
    sets: int = 0

    def sparse(self, name: str) -> _Sparse:
        found = self.tensors[name]
        if not isinstance(found, _Sparse):
            raise ScnError(f'tensor {name} is dense, a sparse one is expected')
        return found

    def dense(self, name: str) -> Axes:
        found = self.tensors[name]
        if isinstance(found, _Sparse):
            raise ScnError(f'tensor {name} is sparse; scatter it first')
        return found


def check(program: Program) -> None:
    """Makes sure that a program is one that libspconv computes as it is meant.

    Raises:
        ScnError: With the node that is wrong.
    """
    if not program.convs:
        raise ScnError('there is no SparseConvolution')
    walk = _Walk({program.input: _Sparse(0, program.grid, program.channels)})
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
    if math.prod(op.kernel) == 1:
        raise ScnError(
            'kernels of 1x1x1 are computed wrongly by libspconv (Lidar_AI_Solution, issue 302)'
        )
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


def _check_precision(*found: str) -> None:
    odd = [p for p in found if p not in PRECISIONS]
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
