"""The way of integers from a DequantizeLinear to a layer: ops that move values or scale them all.

An engine lets a DQ pass an op that only moves values, and joins it with the layer behind. What
passes was measured with NVIDIA's compiler (``docs/lint.md``); interpolation and averages make
values that are on no grid, a ReLU is arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

if TYPE_CHECKING:
    from mmdet3d_quant.check.lint.graph import Graph, Pair

#: Ops that a DQ of an activation passes.
MOVES = frozenset({
    'Cast', 'Concat', 'DepthToSpace', 'Expand', 'Flatten', 'Gather', 'Identity', 'MaxPool', 'Neg',
    'Pad', 'Reshape', 'Slice', 'SpaceToDepth', 'Split', 'Squeeze', 'Tile', 'Transpose',
    'Unsqueeze',
})  # yapf: disable  # fmt: skip
#: The 8-bit floating numbers that layers run in; they pass a MaxPool no more.
FP8 = 'FLOAT8E4M3FN'
#: Ops that a DQ of a weight passes.
_OF_WEIGHTS = frozenset(
    {'Cast', 'Identity', 'Reshape', 'Slice', 'Squeeze', 'Transpose', 'Unsqueeze'}
)
_FACTORS = ('Mul', 'Div')


def unpadded(graph: Graph, conv: NodeProto) -> str:
    """Finds what a convolution reads, zeros around a map left out, which it joins with its own."""
    tensor = conv.input[0]
    while True:
        node = graph.producer.get(tensor)
        if node is None or node.op_type != 'Pad' or not _frames(graph, node):
            return tensor
        tensor = node.input[0]


def _frames(graph: Graph, pad: NodeProto) -> bool:
    """Whether a Pad puts zeros around maps only, not around channels or samples."""
    pads, value = (graph.constant(name) if name else None for name in [*pad.input, '', ''][1:3])
    if _copies(pad) or pads is None or len(pad.input) > 3 or (value is not None and value.any()):
        return False
    return not pads.reshape(2, -1)[:, :2].any()


def _copies(pad: NodeProto) -> bool:
    """Whether a Pad fills with values of its input."""
    return next((a.s for a in pad.attribute if a.name == 'mode'), b'constant') != b'constant'


def reached(graph: Graph, tensor: str) -> list[Pair]:
    """Finds the pairs whose integers an activation consists of.

    Returns:
        list of pairs; several behind a concat. Empty if the values are on no grid, or on several.
    """
    found = _reached(graph, tensor)
    scales = [None if p.scale is None else factor * p.scale for p, factor in found]
    first = scales[0] if scales else None
    if any(s is None or first is None or not np.array_equal(s, first) for s in scales[1:]):
        return []
    return [pair for pair, _ in found]


def _reached(graph: Graph, tensor: str) -> list[tuple[Pair, float]]:
    """Collects the pairs before a tensor, each with what multiplies its scale on the way."""
    pair = graph.pair(tensor)
    if pair is not None:
        return [(pair, 1.0)]
    node = graph.producer.get(tensor)
    if node is None:
        return []
    if node.op_type == 'Concat':
        parts = [_reached(graph, t) for t in node.input]
        return [one for part in parts for one in part] if all(parts) else []
    moved, factor = scaled(graph, node)
    if moved is None:
        return []
    return [(pair, factor * before) for pair, before in _reached(graph, moved)]


def scaled(graph: Graph, node: NodeProto, channels: bool = False) -> tuple[str | None, float]:
    """Tells what a node moves or multiplies by one number, and the number.

    Args:
        graph: Where the node is.
        node: The node.
        channels: Whether there may be numbers by channel, too; then the number is NaN.

    Returns:
        The tensor, None if the node does something else; and the number.
    """
    fills = node.op_type == 'Pad' and not _copies(node)
    if node.op_type in MOVES and node.op_type != 'Concat' and not fills:
        return (None if _stops(graph, node) else node.input[0]), 1.0
    if node.op_type in _FACTORS:
        for i in (0, 1) if node.op_type == 'Mul' else (1,):
            value = graph.constant(node.input[i])
            if value is not None and (channels or value.size == 1):
                number = float(value.reshape(-1)[0]) if value.size == 1 else float('nan')
                number = number if node.op_type == 'Mul' else 1 / number if number else np.inf
                return node.input[1 - i], number
    return None, 1.0


def _stops(graph: Graph, node: NodeProto) -> bool:
    """Whether numbers of FP8 come to an op that only integers pass."""
    return node.op_type == 'MaxPool' and any(
        pair.kind == FP8 for pair, _ in _reached(graph, node.input[0])
    )


def source_of_weight(graph: Graph, tensor: str, axis: int) -> tuple[str, int]:
    """Follows a weight back to where its DQ makes it, or to what is stored.

    Args:
        graph: Where the layer is.
        tensor: What the layer reads.
        axis: Axis of it.

    Returns:
        The first tensor behind a DQ, or that something else than a move makes; and the same axis
        there, -1 if it is cut or joined on the way.
    """
    while graph.pair(tensor) is None:
        node = graph.producer.get(tensor)
        if node is None:
            break
        if node.op_type in _OF_WEIGHTS:
            axis = _axis_before(graph, node, axis)
            tensor = node.input[0]
            continue
        moved, _ = scaled(graph, node, channels=True) if node.op_type in _FACTORS else (None, 1.0)
        if moved is None:
            break
        tensor = moved
    return tensor, axis


def _axis_before(graph: Graph, node: NodeProto, axis: int) -> int:
    """Finds the axis of a move's input that becomes an axis of its output; -1 if none does."""
    if axis < 0 or node.op_type in ('Cast', 'Identity', 'Slice'):
        return axis
    before, behind = (graph.shapes.get(t) for t in (node.input[0], node.output[0]))
    if node.op_type == 'Transpose':
        rank = len(before or behind or ())
        given = next((list(a.ints) for a in node.attribute if a.name == 'perm'), None)
        perm = given or list(range(rank))[::-1]
        return perm[axis] if axis < len(perm) else -1
    if before is None or behind is None or axis >= len(behind):
        return -1
    # The same elements in the same order: an axis stays one if as many lie before it and behind.
    left = int(np.prod(behind[:axis]))
    for i, size in enumerate(before):
        if size == behind[axis] and int(np.prod(before[:i])) == left:
            return i
    return -1
