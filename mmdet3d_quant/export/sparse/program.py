"""A sparse convolution network as plain data: the content of a `lidar.backbone.*.onnx`.

The operators are those of libspconv, the engine of NVIDIA's Lidar_AI_Solution, and their
fields are what its parser reads (`libraries/3DSparseConvolution/src/onnx-parser.cpp`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple, Union

from torch import Tensor

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.export.sparse.arithmetic import LIBSPCONV, Arithmetic

Axes = Tuple[int, ...]

#: Order of the axes -> dims of the only transposition that libspconv fuses into the scattering;
#: without one, only 'zyx' can be scattered.
TRANSPOSITIONS: dict[str, Axes] = {'xyz': (0, 1, 4, 2, 3), 'zyx': (0, 1, 2, 4, 3)}
PRECISIONS = ('fp16', 'int8')


class ScnError(ValueError):
    """A network that its runtime would refuse or compute wrongly, or a file that holds none."""


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


Op = Union[SparseConv, Add, Relu, ScatterDense, Transpose, Reshape]


@dataclass(frozen=True)
class Program:
    """A network for one frame.

    Attributes:
        ops: Operators in the order of execution.
        channels: Channels of a voxel.
        output: Name of the map.
        output_shape: Its shape, (1, C, H, W).
        input: Name of the voxels.
        arithmetic: How the runtime computes it that it is meant for.
    """

    ops: tuple[Op, ...]
    channels: int
    output: str
    output_shape: Axes
    input: str = '0'
    arithmetic: Arithmetic = LIBSPCONV

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
        """Lists the operators that read a tensor, those behind a ReLU included."""
        readers: list[Op] = []
        for op in self.ops:
            if tensor in op.inputs:
                readers.extend(self.readers(op.output) if isinstance(op, Relu) else [op])
        return readers

    def ranges(self, tensor: str) -> set[float]:
        """Collects the ranges of a tensor's INT8 readers; libspconv knows one per tensor."""
        limits = set()
        for op in self.readers(tensor):
            if isinstance(op, SparseConv) and op.precision == 'int8':
                limits.add(op.input_range)
            elif isinstance(op, Add) and op.precision == 'int8':
                read = [
                    r
                    for r, name in strict_zip(op.ranges, op.inputs)
                    if name == tensor or name in self._rectified(tensor)
                ]
                limits.update(read)
        return {r for r in limits if r is not None}

    def _rectified(self, tensor: str) -> set[str]:
        return {op.output for op in self.ops if isinstance(op, Relu) and tensor in op.inputs}


def conflicts(program: Program) -> dict[str, list[float]]:
    """Finds the tensors that INT8 layers read with unequal ranges, and these."""
    by_tensor = {op.output: sorted(program.ranges(op.output)) for op in program.ops}
    return {tensor: ranges for tensor, ranges in by_tensor.items() if len(ranges) > 1}


def conv_grid(grid: Axes, kernel: Axes, stride: Axes, padding: Axes, dilation: Axes) -> Axes:
    """Computes the number of cells along each axis after a strided convolution."""
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in strict_zip(grid, kernel, stride, padding, dilation)
    )
