"""Layers with weights that an engine runs in INT8, and their share of the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnx import NodeProto

from mmdet3d_quant.check.lint.graph import PRODUCTS, Graph


@dataclass(frozen=True)
class Layer:
    """A convolution, or a product with a stored matrix.

    Attributes:
        name: Of its node.
        macs: Multiply-accumulates of one run; of a dynamic batch, of one sample.
        int8: Whether input and weight are integers.
        fp8: Whether they are FP8.
    """

    name: str
    macs: int
    int8: bool
    fp8: bool = False


def layers(graph: Graph) -> list[Layer]:
    """Lists all layers with weights in the order of the file."""
    found = ((graph.name(n), _macs(graph, n), graph.runs_in(n)) for n in graph.layers())
    return [Layer(name, macs, kind == 'Int8', kind == 'FP8') for name, macs, kind in found]


def coverage(convolutions: Iterable[Layer]) -> float:
    """Computes the share of multiply-accumulates in INT8 or FP8, 0 to 1; NaN without layers."""
    convolutions = list(convolutions)
    total = sum(layer.macs for layer in convolutions)
    quantized = sum(layer.macs for layer in convolutions if layer.int8 or layer.fp8)
    return quantized / total if total else math.nan


def summary(convolutions: Sequence[Layer]) -> str:
    """Composes ``'5 of 8 convolutions in INT8 and 2 in FP8'``, without the latter where none is."""
    int8, fp8 = sum(x.int8 for x in convolutions), sum(x.fp8 for x in convolutions)
    more = f' and {fp8} in FP8' if fp8 else ''
    return f'{int8} of {len(convolutions)} convolutions in INT8{more}'


def _macs(graph: Graph, node: NodeProto) -> int:
    """Counts multiply-accumulates: elements of the weight times positions of the output.

    Of a transposed convolution, positions of the input; of a product, rows of the output.
    """
    where = node.input[0] if node.op_type == 'ConvTranspose' else node.output[0]
    shape = graph.shapes.get(where, [])
    batch, *_ = shape or [1]
    positions = math.prod(max(d, 1) for d in (batch, *shape[2:]))
    if node.op_type in PRODUCTS:
        across = -2 if graph.data(node) == node.input[1] else -1  # the matrix's side of the output
        sizes = [d for i, d in enumerate(shape) if i != len(shape) + across]
        positions = math.prod(max(d, 1) for d in sizes)
    pair = graph.weight_pair(node)
    weight = graph.shapes.get(pair.source if pair else graph.weight(node), [])
    return positions * math.prod(max(d, 1) for d in weight)
