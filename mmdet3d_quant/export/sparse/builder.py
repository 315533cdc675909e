"""A program while it is built, operator by operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmdet3d_quant.export.sparse.program import (
    Axes,
    Op,
    Program,
    Reshape,
    ScatterDense,
    SparseConv,
    Transpose,
)


class ProgramBuilder:
    """The operators so far, and the grid and voxels of each tensor."""

    def __init__(
        self,
        grid: Axes,
        flip: bool,
        quantized: bool,
        output_bound: int,
        kept: Mapping[str, str],
        runtime: str = 'libspconv',
    ):
        self.runtime = runtime
        self.kept = kept
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
        """Adds an operator; returns the name of its output."""
        self.ops.append(op)
        self.grids[op.output], self.levels[op.output] = grid, level
        return op.output

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
