"""Rules of tensors that meet: adds, concats, several readers, one rounding behind another."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from mmdet3d_quant.check.lint.graph import Graph
from mmdet3d_quant.check.lint.moves import MOVES, reached
from mmdet3d_quant.check.lint.rules.helpers import same_values
from mmdet3d_quant.check.lint.rules.registry import Found, rule


@rule(
    'Q10',
    'add of tensors with different scales',
    'one of them may be converted first',
    'give both one scale (tie their quantizers)',
)
def _add_scales(graph: Graph) -> Found:
    for node in graph.of('Add', 'Sum'):
        scales = _unequal(graph, node)
        if scales:
            yield node, scales, ''


@rule(
    'Q11',
    'residual add without Q/DQ on a branch',
    'the other branch stays float in memory, and the add is not fused into the convolution',
    'quantize the identity branch, with the scale of the block input',
)
def _residual(graph: Graph) -> Found:
    for node in graph.of('Add', 'Sum'):
        if any(graph.is_constant(t) or graph.pair(t) is not None for t in node.input):
            continue
        # What something else reads, too, as a layer norm beside the add, is kept in float anyway.
        alone = [t for t in node.input if len(graph.readers.get(t, ())) == 1]
        makers = [_maker(graph, t) for t in alone]
        int8 = [m for m in makers if m is not None and graph.is_layer(m) and graph.runs_in(m)]
        if int8:
            yield node, f'adds to {graph.name(int8[0])}', ''


@rule(
    'Q12',
    'concat of tensors with different scales',
    'inputs are converted before they are joined; behind it values are on no one grid',
    'give all inputs one scale (tie their quantizers)',
)
def _concat_scales(graph: Graph) -> Found:
    for node in graph.of('Concat'):
        scales = _unequal(graph, node)
        if scales:
            yield node, scales, _reader(graph, node)


@rule(
    'Q13',
    'concat of quantized and float tensors',
    'the concat runs in float, and so does a layer that reads it',
    'quantize all of its inputs, with one scale',
)
def _concat_mixed(graph: Graph) -> Found:
    for node in graph.of('Concat'):
        inputs = [t for t in node.input if not graph.is_constant(t)]
        open_ = [t for t in inputs if not reached(graph, t)]
        if open_ and len(open_) < len(inputs):
            detail = f'{len(open_)} of {len(node.input)} inputs float, for example {open_[0]}'
            yield node, detail, _reader(graph, node)


@rule(
    'Q14',
    'one tensor quantized with several scales',
    'it is kept, and converted, once per scale',
    'give all of its readers one scale (tie their quantizers)',
)
def _several_scales(graph: Graph) -> Found:
    for tensor, readers in graph.readers.items():
        quantize = [n for n, i in readers if n.op_type == 'QuantizeLinear' and i == 0]
        scales = [graph.grid(n)[0] for n in quantize]
        known = [s for s in scales if s is not None]
        if any(not np.array_equal(s, known[0]) for s in known[1:]):
            values = ', '.join(f'{s.flat[0]:.4g}' for s in known)
            yield quantize[0], f'{tensor}: scales {values}', ''


@rule(
    'Q15',
    'dequantized and quantized again',
    'rounds twice, and adds a conversion if the scales differ',
    'keep one of the two pairs',
)
def _double(graph: Graph) -> Found:
    for node in graph.of('QuantizeLinear'):
        pair = graph.pair(node.input[0])
        if pair is not None:
            yield node, f'behind {graph.name(pair.dq)}', ''


def _maker(graph: Graph, tensor: str) -> NodeProto | None:
    """The op that makes a tensor, a batch norm that should have been folded left out."""
    node = graph.producer.get(tensor)
    if node is not None and node.op_type == 'BatchNormalization':
        return graph.producer.get(node.input[0])
    return node


def _unequal(graph: Graph, node: NodeProto) -> str:
    """The scales of a node's inputs, if they differ; else nothing."""
    found = [pair for tensor in node.input for pair in reached(graph, tensor)[:1]]
    scales = [pair.scale for pair in found if pair.scale is not None]
    if all(same_values(s, scales[0]) for s in scales[1:]):
        return ''
    return 'scales ' + ', '.join(f'{s.flat[0]:.4g}' for s in scales)


def _reader(graph: Graph, node: NodeProto) -> str:
    """Tells whether a layer reads what a node makes, moved or not."""
    for reader, i in graph.readers[node.output[0]]:
        moved = reader.op_type in MOVES and i == 0
        if graph.is_layer(reader) or (moved and _reader(graph, reader) == LAYER):
            return LAYER
    return 'no layer reads it'


LAYER = 'a layer reads it'
