"""Rules of a QuantizeLinear and the DequantizeLinear that belongs to it."""

from __future__ import annotations

from mmdet3d_quant.check.lint.graph import Graph
from mmdet3d_quant.check.lint.moves import MOVES
from mmdet3d_quant.check.lint.rules.helpers import all_pairs, same_values
from mmdet3d_quant.check.lint.rules.registry import INTEGER_OPS, Found, rule


@rule(
    'Q31',
    'Q and DQ disagree',
    'values come back scaled',
    'give both one scale, zero point and axis',
)
def _disagree(graph: Graph) -> Found:
    for pair in all_pairs(graph):
        if pair.q is None:
            continue
        scale, zero = graph.grid(pair.q)
        same = same_values(scale, pair.scale) and same_values(zero, pair.zero)
        per_channel = scale is not None and scale.size > 1
        if not same or (per_channel and graph.axis(pair.q, pair.source) != pair.axis):
            yield pair.dq, f'and {graph.name(pair.q)}', ''


@rule(
    'Q32',
    'Q without DQ',
    'integers leave the quantized world, and the next layer takes them for real values',
    'let a DequantizeLinear read them',
)
def _lonely(graph: Graph) -> Found:
    for node in graph.of('QuantizeLinear'):
        readers = sorted(_ends(graph, node.output[0]))
        if OUTPUT in readers:
            yield node, 'is an output of the graph', 'an output'
        elif not readers:
            yield node, 'read by nobody', 'read by nobody'
        elif not set(readers) <= {'DequantizeLinear', *INTEGER_OPS}:
            yield node, f'read by {", ".join(readers)}', 'read as numbers'


OUTPUT = 'an output of the graph'


def _ends(graph: Graph, tensor: str) -> set[str]:
    """Operators that read integers in the end, behind those that move them."""
    found = {OUTPUT} if tensor in graph.outputs else set()
    for node, i in graph.readers[tensor]:
        if node.op_type in MOVES and i == 0 and node.op_type not in ('Cast', 'Neg', 'Pad'):
            found |= set().union(*(_ends(graph, out) for out in node.output))
        else:
            found.add(node.op_type)
    return found
