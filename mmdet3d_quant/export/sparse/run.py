"""Execution of a program in torch, without libspconv or a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from spconv.pytorch import SparseConvTensor
from torch import Tensor, nn

from mmdet3d_quant.core.fake_quant import fake_quantize
from mmdet3d_quant.core.spec import QuantSpec
from mmdet3d_quant.export.sparse.check import check
from mmdet3d_quant.export.sparse.program import (
    Add,
    Op,
    Program,
    Relu,
    ScatterDense,
    ScnError,
    SparseConv,
    Transpose,
)
from mmdet3d_quant.parents.sparse_conv import PortableSparseConv3d, PortableSubMConv3d

_ACTIVATION = QuantSpec()
_WEIGHT = QuantSpec(axis=0)


class ScnNetwork(nn.Module):
    """A program as a module.

    INT8 layers round their input to the grid of its range and their weight to that of each
    output channel, and sum exactly: values of the grids, or with ``arithmetic.integers`` their
    numbers, whose sum is scaled by channel before the bias is added. A tensor that is kept in INT8
    is rounded when it is made, too, which changes nothing more if all that read it have one range.
    Weights and biases are the FP16 numbers of the file.

    Args:
        program: The network.
        fp16_tensors: Round what is kept in FP16 between layers, as runtimes keep it. The sums
            themselves are not those of their kernels.
        dtype: Floating type of the computation.

    Attributes:
        voxels: Number of voxels that each convolution made in the last run, by name of its node.
    """

    def __init__(
        self,
        program: Program,
        fp16_tensors: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        check(program)
        self.program = program
        self.fp16_tensors = fp16_tensors
        self.dtype = dtype
        integers = program.arithmetic.integers
        self.convs = nn.ModuleDict({op.name: _conv(op, dtype, integers) for op in program.convs})
        self.voxels: dict[str, int] = {}

    @torch.no_grad()
    def forward(self, features: Tensor, coors: Tensor) -> Tensor:
        """Computes the map of one frame.

        Args:
            features: Voxels (N, channels), float; N may be 0.
            coors: (N, 4), integer, columns (0, a, b, c) in the order of the file: x, y, z or
                z, y, x. All different.

        Returns:
            Map of the program's output shape, zero where nothing is active.

        Raises:
            ScnError: If the voxels do not fit the program.
        """
        program = self.program
        _check_voxels(program, features, coors)
        self.voxels = {}
        if len(features) == 0:
            return features.new_zeros(program.output_shape, dtype=self.dtype)
        x = SparseConvTensor(
            self._kept(features.to(self.dtype), 'fp16', ()), coors.int(), list(program.grid), 1
        )
        tensors: dict[str, Any] = {program.input: x}
        for op in program.ops:
            tensors[op.output] = self._run(op, [tensors[name] for name in op.inputs])
        return tensors[program.output]

    def crowded(self) -> list[str]:
        """Tells which convolutions made more voxels in the last run than the file has room for."""
        return [
            f'{op.name} ({op.layer}) makes {self.voxels[op.name]:,} voxels, and its output_bound, '
            f'for which libspconv reserves memory, is {op.output_bound:,}: call export_lidar '
            'with a larger output_bound, or crop the points'
            for op in self.program.convs
            if self.voxels.get(op.name, 0) > op.output_bound
        ]

    def _run(self, op: Op, inputs: list[Any]) -> Any:
        x = inputs[0]
        if isinstance(op, SparseConv):
            y = self._convolved(op, x)
            self.voxels[op.name] = len(y.features)
            return self._sparse(op, y, y.features.relu() if op.relu else y.features)
        if isinstance(op, Add):
            a, b = (t.features for t in inputs)
            if op.precision == 'int8':
                a, b = _rounded(a, op.ranges[0]), _rounded(b, op.ranges[1])
            return self._sparse(op, x, a + b)
        if isinstance(op, Relu):
            return x.replace_feature(x.features.relu())
        if isinstance(op, ScatterDense):
            return x.dense()
        return x.permute(op.dims) if isinstance(op, Transpose) else x.reshape(op.dims)

    def _convolved(self, op: SparseConv, x: Any) -> Any:
        conv = self.convs[op.name]
        if op.precision != 'int8':
            return conv(x)
        assert op.input_range is not None and op.weight_ranges is not None
        if not self.program.arithmetic.integers:
            return conv(x.replace_feature(_rounded(x.features, op.input_range)))
        step = op.input_range / 127
        y = conv(x.replace_feature((x.features / step).round().clamp(-128, 127)))
        scale = y.features.new_tensor(op.weight_ranges) / 127 * step
        return y.replace_feature(y.features * scale + op.bias.to(y.features))

    def _sparse(self, op: SparseConv | Add, like: SparseConvTensor, values: Tensor) -> Any:
        ranges = self.program.ranges(op.output) if op.output_precision == 'int8' else ()
        return like.replace_feature(self._kept(values, op.output_precision, tuple(ranges)))

    def _kept(self, values: Tensor, precision: str, ranges: tuple[float, ...]) -> Tensor:
        if precision == 'int8':
            return _rounded(values, ranges[0]) if len(ranges) == 1 else values
        return values.half().to(values.dtype) if self.fp16_tensors else values


class ScnEncoder(nn.Module):
    """A network of one frame in the place of the sparse encoder that it is of, frame by frame."""

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor, coors: Tensor, batch_size: int) -> Tensor:
        """Computes the maps, (B, C, H, W); coordinates (N, 4): frame, and three axes."""
        maps = []
        for frame in range(batch_size):
            mine = coors[:, 0] == frame
            places = coors[mine].clone()
            places[:, 0] = 0
            maps.append(self.network(features[mine], places))
        return torch.cat(maps)


def _conv(op: SparseConv, dtype: torch.dtype, integers: bool) -> nn.Module:
    """Makes a convolution; with ``integers`` of an INT8 weight, whose bias is added later."""
    whole = integers and op.precision == 'int8'
    kind = PortableSubMConv3d if op.subm else PortableSparseConv3d
    conv = kind(
        op.weight.shape[-1],
        op.weight.shape[0],
        op.kernel,
        stride=op.stride,
        padding=op.padding,
        dilation=op.dilation,
        bias=not whole,
    )
    weight = op.weight.to(dtype)
    if op.precision == 'int8':
        assert op.weight_ranges is not None
        limits = torch.tensor(op.weight_ranges)
        if whole:
            steps = (limits / 127).to(dtype).reshape(-1, 1, 1, 1, 1)
            weight = (weight / steps).round().clamp(-127, 127)
        else:
            weight = fake_quantize(weight, limits, _WEIGHT)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    if not whole:
        conv.bias = nn.Parameter(op.bias.to(dtype), requires_grad=False)
    return conv


def _rounded(values: Tensor, limit: float | None) -> Tensor:
    assert limit is not None
    return fake_quantize(values, torch.tensor(limit, device=values.device), _ACTIVATION)


def _check_voxels(program: Program, features: Tensor, coors: Tensor) -> None:
    if features.dim() != 2 or features.shape[1] != program.channels:
        raise ScnError(
            f'voxels of shape {tuple(features.shape)}; the file expects (N, {program.channels})'
        )
    if tuple(coors.shape) != (len(features), 4):
        raise ScnError(
            f'coordinates of shape {tuple(coors.shape)} for {len(features)} voxels; expected (N, 4)'
        )
    limits = coors.new_tensor([1, *program.grid])
    if bool(((coors < 0) | (coors >= limits)).any()):
        raise ScnError(
            f'coordinates outside of one frame of {program.grid} cells ({program.order})'
        )
    if len(coors.unique(dim=0)) != len(coors):
        raise ScnError('two voxels have the same coordinates')
