"""Where an engine has to convert between INT8 and float: each is a pass over memory of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnx import NodeProto

from mmdet3d_quant.check.lint.graph import CONVOLUTIONS, PRODUCTS, Graph

#: Ops that an engine computes in the kernel of the INT8 layer before them.
FUSED = frozenset({'Add', 'Clip', 'LeakyRelu', 'Relu', 'Sum'})
#: Ops that move integers as well as reals, so that Q and DQ pass through them.
MOVING = frozenset({
    'Concat', 'DepthToSpace', 'Expand', 'Flatten', 'Gather', 'Identity', 'MaxPool', 'Reshape',
    'Resize', 'Slice', 'Split', 'Squeeze', 'Transpose', 'Unsqueeze',
})  # yapf: disable  # fmt: skip
_READERS = frozenset({*CONVOLUTIONS, *PRODUCTS, 'Add', 'Sum', 'QuantizeLinear'})
TO_INT8, TO_FLOAT = 'to INT8', 'to float'


@dataclass(frozen=True)
class Reformat:
    """A conversion that is not part of another kernel.

    Attributes:
        node: Name of the QuantizeLinear or DequantizeLinear.
        tensor: What is converted.
        kind: :data:`TO_INT8` or :data:`TO_FLOAT`.
        layer: Name of the convolution that reads the result or, if none does, made the tensor;
            empty if there is neither.
    """

    node: str
    tensor: str
    kind: str
    layer: str


def reformats(graph: Graph) -> list[Reformat]:
    """All conversions of activations in the order of the file, one per tensor, scale and kind."""
    conversions: dict[tuple, Reformat] = {}
    for node in graph.of('QuantizeLinear', 'DequantizeLinear'):
        q = node if node.op_type == 'QuantizeLinear' else graph.producer.get(node.input[0])
        if q is None or q.op_type != 'QuantizeLinear' or graph.is_constant(q.input[0]):
            continue  # a weight
        source = q.input[0]
        scale = graph.grid(q)[0]
        step = None if scale is None else tuple(scale)
        if node is q:
            needed, kind = not _from_int8(graph, source), TO_INT8
        else:
            needed, kind = not _to_int8(graph, node.output[0]), TO_FLOAT
        if needed and (source, step, kind) not in conversions:
            layer = next(layers_behind(graph, node.output[0]), None)
            layer = layer or _conv_before(graph, source)
            name = '' if layer is None else graph.name(layer)
            conversions[source, step, kind] = Reformat(graph.name(node), source, kind, name)
    return list(conversions.values())


def _from_int8(graph: Graph, tensor: str) -> bool:
    """Whether an INT8 kernel, or only moves of what one made, can write the tensor as INT8."""
    node = graph.producer.get(tensor)
    if node is None:
        return False
    if node.op_type in (*CONVOLUTIONS, *PRODUCTS):
        return bool(graph.runs_in(node))
    if node.op_type == 'DequantizeLinear':
        return True
    if node.op_type in ('Add', 'Sum'):  # part of an INT8 layer's kernel, which reads the others
        made = [t for t in node.input if graph.pair(t) is None]
        return any(_from_int8(graph, t) for t in made) or not made
    if node.op_type == 'Concat':
        return all(_from_int8(graph, t) for t in node.input)
    if node.op_type in FUSED or _moves(node):
        return _from_int8(graph, node.input[0])
    return False


def _to_int8(graph: Graph, tensor: str) -> bool:
    """Whether all that reads a dequantized tensor can take it as INT8."""
    if tensor in graph.outputs:
        return False
    for node, _ in graph.readers[tensor]:
        if node.op_type in (*CONVOLUTIONS, *PRODUCTS):
            good = bool(graph.runs_in(node))
        elif _moves(node):
            good = _to_int8(graph, node.output[0])
        else:
            good = node.op_type in _READERS
        if not good:
            return False
    return True


def _moves(node: NodeProto) -> bool:
    """Tells whether a node only moves values; interpolation makes new ones, nearest does not."""
    mode = next((a.s for a in node.attribute if a.name == 'mode'), b'nearest')
    return node.op_type in MOVING and (node.op_type != 'Resize' or mode == b'nearest')


def layers_behind(graph: Graph, tensor: str, depth: int = 8) -> Iterator[NodeProto]:
    """Yields layers that read a tensor, directly or through at most so many other ops."""
    for node, _ in graph.readers[tensor]:
        if graph.is_layer(node):
            yield node
        elif depth:
            for out in node.output:
                yield from layers_behind(graph, out, depth - 1)


def _conv_before(graph: Graph, tensor: str) -> NodeProto | None:
    """The convolution that a tensor comes from, along first inputs."""
    node = graph.producer.get(tensor)
    while node is not None and not graph.is_layer(node):
        node = graph.producer.get(node.input[0]) if node.input else None
    return node
