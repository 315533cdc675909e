"""spconv's 3D convolutions with a CPU path that trains, in plain torch.

spconv 2.3.8 is made for GPUs. On a CPU its convolutions lose summands on more than one thread,
and their backward asks for a CUDA stream and fails on a machine without a driver. Here spconv still
finds out which voxels meet under which weight; the arithmetic is gather, multiply and sum. On a
GPU these classes are spconv's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from spconv.pytorch import SparseConv3d, SparseConvTensor, SubMConv3d, ops
from torch import Tensor

from mmdet3d_quant.core.compat import strict_zip


@dataclass(frozen=True)
class Rulebook:
    """Pairs of input and output voxel, with the weight between them.

    Attributes:
        inputs: Indices of the input voxels (n, 4), int32, for which the rules hold.
        outputs: Indices of the output voxels (m, 4), int32.
        source: Input row of each of p pairs, ordered by weight; int64 (p,).
        target: Output row of each pair, int64 (p,).
        counts: Number of pairs of each of the K weights.
        by_source: Pairs ordered by input row (p,), and where each row's begin (n,).
        by_target: The same by output row, (p,) and (m,).
    """

    inputs: Tensor
    outputs: Tensor
    source: Tensor
    target: Tensor
    counts: list[int]
    by_source: tuple[Tensor, Tensor]
    by_target: tuple[Tensor, Tensor]


def rulebook(conv: SparseConv3d | SubMConv3d, x: SparseConvTensor) -> Rulebook:
    """Computes the rules of a convolution for the voxels of a tensor."""
    outputs, pairs, counts = ops.get_indice_pairs(
        x.indices,
        x.batch_size,
        x.spatial_shape,
        conv.algo,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.output_padding,
        conv.subm,
        conv.transposed,
    )
    if conv.subm:
        outputs = x.indices  # equal to spconv's copy; the tensor itself is what rules are known by
    sizes = counts.tolist()
    rows = list(pairs.long().unbind(1))
    if conv.subm:
        # spconv counts the first half; the weight opposite has as many pairs, the middle all.
        middle = len(sizes) // 2
        sizes = [*sizes[:middle], len(x.indices), *sizes[:middle][::-1]]
        rows[middle] = torch.arange(len(x.indices)).expand(2, -1)
    joint = torch.cat([row[:, :size] for row, size in strict_zip(rows, sizes)], dim=1)
    source, target = joint.contiguous()
    return Rulebook(
        inputs=x.indices,
        outputs=outputs,
        source=source,
        target=target,
        counts=sizes,
        by_source=_grouped(source, sizes, len(x.indices)),
        by_target=_grouped(target, sizes, len(outputs)),
    )


def _grouped(rows: Tensor, counts: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Sorts the pairs by row, by counting; returns the order and where each row's pairs begin.

    Args:
        rows: Row of each pair, (p,); a row comes once per weight at most.
        counts: Number of pairs of each weight.
        count: Number of rows.
    """
    sizes = torch.bincount(rows, minlength=count)
    begins = sizes.cumsum(0) - sizes
    order = torch.empty_like(rows)
    free, numbers = begins.clone(), torch.arange(len(rows))
    for part, number in strict_zip(rows.split(counts), numbers.split(counts)):
        place = free.index_select(0, part)
        order[place] = number
        free[part] = place + 1
    return order, begins


class _Convolve(torch.autograd.Function):
    """Convolves features (n, in) with weights (K, in, out) by the rules, to features (m, out)."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, rules: Rulebook) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.rules = rules
        return _sum(_products(features, rules.source, weight, rules.counts), rules.by_target)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        features, weight = ctx.saved_tensors
        rules = ctx.rules
        to_features = to_weight = None
        if ctx.needs_input_grad[0]:
            products = _products(grad, rules.target, weight.mT, rules.counts)
            to_features = _sum(products, rules.by_source)
        if ctx.needs_input_grad[1]:
            pairs = strict_zip(rules.source.split(rules.counts), rules.target.split(rules.counts))
            to_weight = torch.stack(
                [features.index_select(0, s).T @ grad.index_select(0, t) for s, t in pairs]
            )
        return to_features, to_weight, None


def _products(rows: Tensor, pick: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Multiplies the picked rows by the weights of their pairs: (p, columns of a weight)."""
    out = rows.new_empty(len(pick), weight.shape[2])
    for picked, matrix, place in strict_zip(pick.split(counts), weight, out.split(counts)):
        torch.mm(rows.index_select(0, picked), matrix, out=place)
    return out


def _sum(rows: Tensor, groups: tuple[Tensor, Tensor]) -> Tensor:
    """Sums the rows of each group, always in the same order."""
    order, begins = groups
    return F.embedding_bag(order, rows, begins, mode='sum')


if TYPE_CHECKING:
    from spconv.pytorch.conv import SparseConvolution as _Convolution
else:
    _Convolution = object


class _Portable(_Convolution):
    """Convolves in plain torch on a CPU; the constructor and the parameters are spconv's."""

    @property
    def _rules_key(self) -> str:
        """Name of the rules that this layer leaves with its output."""
        geometry = (self.subm, *self.kernel_size, *self.stride, *self.padding, *self.dilation)
        return f'rulebook{geometry}'

    def num_pairs(self, output: SparseConvTensor) -> int | None:
        """Counts the pairs of voxels that met in what this layer returned; None on a GPU."""
        if self.conv1x1:
            return len(output.features)
        rules = output.indice_dict.get(self._rules_key)
        return sum(rules.counts) if isinstance(rules, Rulebook) else None

    def _conv_forward(
        self,
        training: bool,
        input: SparseConvTensor,
        weight: Tensor,
        bias: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> SparseConvTensor:
        if input.features.device.type != 'cpu' or self.conv1x1:
            return super()._conv_forward(training, input, weight, bias, *args, **kwargs)
        key = self._rules_key  # layers of one stage read the same voxels: the rules travel
        rules = input.indice_dict.get(key)
        if rules is None or rules.inputs is not input.indices:
            rules = rulebook(self, input)
        matrices = weight.flatten(1, 3).permute(1, 2, 0)
        features = _Convolve.apply(input.features, matrices, rules)
        output = input.replace_feature(features if bias is None else features + bias)
        output.indices = rules.outputs
        output.indice_dict = {**input.indice_dict, key: rules}
        if not self.subm:
            output.spatial_shape = ops.get_conv_output_size(
                input.spatial_shape, self.kernel_size, self.stride, self.padding, self.dilation
            )
        return output


class PortableSubMConv3d(_Portable, SubMConv3d):
    """``spconv.pytorch.SubMConv3d`` that also runs and trains on a CPU."""


class PortableSparseConv3d(_Portable, SparseConv3d):
    """``spconv.pytorch.SparseConv3d`` that also runs and trains on a CPU."""
