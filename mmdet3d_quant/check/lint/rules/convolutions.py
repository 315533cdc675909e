"""Rules of a layer, convolution or product: what it reads, what stands before and behind it."""

from __future__ import annotations

from onnx import NodeProto

from mmdet3d_quant.check.lint.graph import Graph
from mmdet3d_quant.check.lint.rules.registry import Found, rule

#: Ops that only pass or rearrange values; before a convolution they keep its DQ from it.
PASSING = (
    'Cast', 'Clip', 'Flatten', 'Identity', 'LeakyRelu', 'Mul', 'Pad', 'Relu', 'Reshape', 'Sigmoid',
    'Slice', 'Squeeze', 'Transpose', 'Unsqueeze',
)  # yapf: disable  # fmt: skip


@rule(
    'Q01',
    'batch norm left behind a convolution',
    'it runs in float between two INT8 layers, or keeps the convolution from INT8',
    'fold it into the convolution before exporting',
)
def _batch_norm(graph: Graph) -> Found:
    for node in graph.of('BatchNormalization'):
        before = graph.producer.get(node.input[0])
        if before is not None and graph.is_layer(before):
            yield node, f'behind {graph.name(before)}'


@rule(
    'Q02',
    'input of a layer is not quantized',
    'with only its weight quantized, the layer runs in float',
    'put Q/DQ on its input',
)
def _input(graph: Graph) -> Found:
    for node in graph.layers():
        open_ = graph.pair(node.input[0]) is None and not _behind_passing(graph, node.input[0])
        if open_ and graph.weight_pair(node) is not None:
            yield node, f'reads {node.input[0]}'


@rule(
    'Q03',
    'weight of a layer is not quantized',
    'with only its input quantized, the layer runs in float',
    'put Q/DQ on its weight, per output channel',
)
def _weight(graph: Graph) -> Found:
    for node in graph.layers():
        open_ = graph.weight_pair(node) is None and not _behind_passing(graph, graph.weight(node))
        if open_ and graph.pair(node.input[0]) is not None:
            yield node, f'weight {node.input[1]}'


@rule(
    'Q04',
    'float layer between INT8 layers',
    'its input is converted from and its output to INT8: two reformats besides the slow layer',
    'quantize it, or keep everything up to the next end of the graph float',
)
def _island(graph: Graph) -> Found:
    before, behind = _reached(graph, forward=True), _reached(graph, forward=False)
    for node in graph.layers():
        plain = graph.pair(node.input[0]) is None and graph.weight_pair(node) is None
        factors = node.input[0], graph.weight(node)
        plain = plain and not any(_behind_passing(graph, t) for t in factors)
        if plain and id(node) in before and id(node) in behind:
            yield node, 'INT8 before and behind it: 2 reformats'


@rule(
    'Q05',
    'something between DQ and layer',
    'an engine fuses a DQ only with the layer that reads it',
    'move Q/DQ to directly before the layer',
)
def _blocked(graph: Graph) -> Found:
    for node in graph.layers():
        for tensor, what in zip((node.input[0], graph.weight(node)), ('input', 'weight')):
            between = _behind_passing(graph, tensor)
            if between is not None:
                yield node, f'{graph.name(between)} ({between.op_type}) on its {what}'


@rule(
    'Q06',
    'Q/DQ between a convolution and its activation',
    'convolution and activation are no longer one kernel',
    'quantize behind the activation',
)
def _before_activation(graph: Graph) -> Found:
    for node in graph.of('Relu', 'Clip', 'LeakyRelu'):
        pair = graph.pair(node.input[0])
        if pair is None or pair.q is None:
            continue
        before = graph.producer.get(pair.source)
        if before is not None and (
            graph.is_layer(before) or before.op_type in ('Add', 'BatchNormalization')
        ):
            yield pair.q, f'between {graph.name(before)} and {graph.name(node)}'


@rule(
    'Q07',
    'Q/DQ on a bias',
    'biases are added in INT32 or float; TensorRT refuses or ignores their Q/DQ',
    'leave the bias float',
)
def _bias(graph: Graph) -> Found:
    for node in graph.layers():
        if len(node.input) > 2 and graph.pair(node.input[2]) is not None:
            yield node, f'bias {node.input[2]}'


def _behind_passing(graph: Graph, tensor: str) -> NodeProto | None:
    """The op that makes a tensor, if it only passes on what a DQ made."""
    node = graph.producer.get(tensor)
    if node is None or node.op_type not in PASSING:
        return None
    return node if any(graph.pair(t) is not None for t in node.input) else None


def _reached(graph: Graph, forward: bool) -> set[int]:
    """Nodes that an INT8 convolution leads to, or that lead to one."""
    reached: set[int] = set()
    for node in graph.nodes if forward else reversed(graph.nodes):
        if forward:
            near = [graph.producer[t] for t in node.input if t in graph.producer]
        else:
            near = [n for t in node.output for n, _ in graph.readers[t]]
        if any(id(n) in reached or (graph.is_layer(n) and graph.is_int8(n)) for n in near):
            reached.add(id(node))
    return reached
