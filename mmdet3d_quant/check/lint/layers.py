"""Convolutions that an engine runs in INT8, and their share of the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from onnx import NodeProto

from mmdet3d_quant.check.lint.graph import LAYERS, Graph


@dataclass(frozen=True)
class Layer:
    """A convolution.

    Attributes:
        name: Of its node.
        macs: Multiply-accumulates of one run; of a dynamic batch, of one sample.
        int8: Whether input and weight are quantized.
    """

    name: str
    macs: int
    int8: bool


def layers(graph: Graph) -> list[Layer]:
    """Lists all convolutions in the order of the file."""
    return [
        Layer(
            graph.name(node),
            _macs(graph, node),
            all(graph.pair(tensor) is not None for tensor in node.input[:2]),
        )
        for node in graph.of(*LAYERS)
    ]


def coverage(convolutions: Iterable[Layer]) -> float:
    """Computes the share of multiply-accumulates in INT8, 0 to 1; NaN without convolutions."""
    convolutions = list(convolutions)
    total = sum(layer.macs for layer in convolutions)
    return sum(layer.macs for layer in convolutions if layer.int8) / total if total else math.nan


def _macs(graph: Graph, node: NodeProto) -> int:
    """Counts multiply-accumulates: elements of the weight times positions of the output.

    Of a transposed convolution, positions of the input.
    """
    where = node.input[0] if node.op_type == 'ConvTranspose' else node.output[0]
    shape = graph.shapes.get(where, [])
    batch, *_ = shape or [1]
    positions = math.prod(max(d, 1) for d in (batch, *shape[2:]))
    pair = graph.weight_pair(node)
    weight = graph.shapes.get(pair.source if pair else node.input[1], [])
    return positions * math.prod(max(d, 1) for d in weight)
