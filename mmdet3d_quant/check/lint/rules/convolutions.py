"""Rules of a layer, convolution or product: what it reads, what stands before and behind it."""

from __future__ import annotations

from onnx import NodeProto

from mmdet3d_quant.check.lint.graph import FP8_PLACES, Graph
from mmdet3d_quant.check.lint.moves import FP8, reached, scaled
from mmdet3d_quant.check.lint.rules.registry import Found, rule

#: Arithmetic on values; between a DQ and a layer it keeps the two from each other.
BETWEEN = (
    'Add', 'AveragePool', 'BatchNormalization', 'Cast', 'Clip', 'Div', 'GlobalAveragePool',
    'LeakyRelu', 'Max', 'MaxPool', 'Min', 'Mul', 'Neg', 'Pad', 'Relu', 'Resize', 'Sigmoid', 'Sub',
    'Upsample',
)  # yapf: disable  # fmt: skip


@rule(
    'Q01',
    'batch norm left behind a convolution',
    'engines fold it when they build; where one does not, it runs in float between two INT8 layers',
    'fold it into the convolution before exporting',
)
def _batch_norm(graph: Graph) -> Found:
    for node in graph.of('BatchNormalization'):
        before = graph.producer.get(node.input[0])
        if before is not None and graph.is_layer(before):
            yield node, f'behind {graph.name(before)}', ''


@rule(
    'Q02',
    'input of a layer is not quantized',
    'with only its weight quantized, the layer runs in float',
    'put Q/DQ on its input',
)
def _input(graph: Graph) -> Found:
    for node in graph.layers():
        if _read(graph, node) == _OPEN and graph.weight_pair(node) is not None:
            yield node, f'reads {graph.data(node)}', ''


@rule(
    'Q03',
    'weight of a layer is not quantized',
    'with only its input quantized, the layer runs in float',
    'put Q/DQ on its weight, per output channel',
)
def _weight(graph: Graph) -> Found:
    for node in graph.layers():
        open_ = graph.weight_pair(node) is None and not _between(graph, graph.weight(node))
        if open_ and _read(graph, node) == _QUANTIZED:
            yield node, f'weight {graph.weight(node)}', ''


@rule(
    'Q04',
    'float layer between INT8 layers',
    'its input is converted from and its output to INT8: two reformats besides the slow layer',
    'quantize it, or keep everything up to the next end of the graph float',
)
def _island(graph: Graph) -> Found:
    before, behind = _reached(graph, forward=True), _reached(graph, forward=False)
    for node in graph.layers():
        plain = _read(graph, node) == _OPEN and graph.weight_pair(node) is None
        plain = plain and not _between(graph, graph.weight(node))
        if plain and id(node) in before and id(node) in behind:
            yield node, 'INT8 before and behind it: 2 reformats', ''


@rule(
    'Q05',
    'something between DQ and layer',
    'an engine joins a DQ with the layer that reads it, directly or behind ops that only move '
    'values or scale them all',
    'move Q/DQ to directly before the layer',
)
def _blocked(graph: Graph) -> Found:
    for node in graph.layers():
        for tensor, what in ((graph.data(node), 'input'), (graph.weight(node), 'weight')):
            between = _between(graph, tensor)
            if between is not None:
                yield node, f'{graph.name(between)} ({between.op_type}) on its {what}', what


@rule(
    'Q06',
    'Q/DQ between a convolution and its activation',
    'convolution and activation may no longer be one kernel',
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
            yield pair.q, f'between {graph.name(before)} and {graph.name(node)}', ''


@rule(
    'Q07',
    'Q/DQ on a bias',
    'biases are added in INT32 or float: TensorRT folds their Q/DQ, not beside a weight with one '
    'scale, and refuses stored INT32',
    'leave the bias float',
)
def _bias(graph: Graph) -> Found:
    for node in graph.layers():
        pair = graph.pair(node.input[2]) if len(node.input) > 2 else None
        if pair is None:
            continue
        weight = graph.weight_pair(node)
        one = weight is not None and weight.scale is not None and weight.scale.size == 1
        case = 'integers' if pair.kind == 'INT32' else f'Q/DQ{", one weight scale" * one}'
        yield node, f'bias {node.input[2]}, {case}', case


@rule(
    'Q36',
    'transposed convolution',
    'it runs in float, whatever its scales are; TensorRT 8 reads INT8 but writes float '
    '(NVIDIA/TensorRT#2597)',
    'with a kernel as large as its stride it is a 1x1 convolution and DepthToSpace; else leave it '
    'float',
)
def _transposed(graph: Graph) -> Found:
    for node in graph.of('ConvTranspose'):
        if graph.read_pairs(node) and graph.weight_pair(node) is not None:
            yield node, 'with Q/DQ', ''


@rule(
    'Q45',
    'FP8 convolution with a large kernel',
    f'a kernel of more than {FP8_PLACES} places, as 7x7, runs in the type outside of Q/DQ',
    'quantize the layer to INT8, or keep it float: its rounding costs accuracy for nothing',
)
def _large_kernel(graph: Graph) -> Found:
    for node in graph.of('Conv'):
        kinds = {pair.kind for pair in graph.read_pairs(node)}
        if FP8 in kinds and graph.profile.fp8 and graph.places(node) > FP8_PLACES:
            yield node, f'{graph.places(node)} places', ''


_OPEN, _QUANTIZED, _SEVERAL, _BEHIND = 'open', 'quantized', 'on several grids', 'behind arithmetic'


def _read(graph: Graph, layer: NodeProto) -> str:
    """Tells how a layer's activation is quantized."""
    tensor = graph.data(layer)
    if graph.read_pairs(layer):
        return _QUANTIZED
    if _joined(graph, tensor):
        return _SEVERAL  # which is Q12 or Q13
    return _BEHIND if _between(graph, tensor) is not None else _OPEN


def _joined(graph: Graph, tensor: str) -> bool:
    """Whether a concat, moved or not, with a quantized input makes a tensor."""
    node = _unmoved(graph, tensor)
    return (
        node is not None and node.op_type == 'Concat' and any(reached(graph, t) for t in node.input)
    )


def _unmoved(graph: Graph, tensor: str) -> NodeProto | None:
    """The op that makes a tensor, those that only move its values left out."""
    node = graph.producer.get(tensor)
    while node is not None:
        moved, _ = scaled(graph, node)
        if moved is None:
            return node
        node = graph.producer.get(moved)
    return None


def _between(graph: Graph, tensor: str) -> NodeProto | None:
    """The arithmetic that keeps a layer from the DQ that a tensor comes from; None if none does."""
    if graph.pair(tensor) is not None:
        return None
    node = _unmoved(graph, tensor)
    if node is None or node.op_type not in BETWEEN:
        return None
    return node if any(reached(graph, t) for t in node.input) else None


def _reached(graph: Graph, forward: bool) -> set[int]:
    """Nodes that an INT8 convolution leads to, or that lead to one."""
    reached: set[int] = set()
    for node in graph.nodes if forward else reversed(graph.nodes):
        if forward:
            near = [graph.producer[t] for t in node.input if t in graph.producer]
        else:
            near = [n for t in node.output for n, _ in graph.readers[t]]
        if any(id(n) in reached or (graph.is_layer(n) and graph.runs_in(n)) for n in near):
            reached.add(id(node))
    return reached
