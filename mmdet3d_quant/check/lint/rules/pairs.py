"""Rules of a QuantizeLinear and the DequantizeLinear that belongs to it."""

from __future__ import annotations

from mmdet3d_quant.check.lint.graph import Graph
from mmdet3d_quant.check.lint.rules.helpers import all_pairs, same_values
from mmdet3d_quant.check.lint.rules.registry import Found, rule


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
            yield pair.dq, f'and {graph.name(pair.q)}'


@rule(
    'Q32',
    'Q without DQ',
    'integers leave the quantized world, and the next layer takes them for real values',
    'let a DequantizeLinear read them',
)
def _lonely(graph: Graph) -> Found:
    for node in graph.of('QuantizeLinear'):
        readers = [n.op_type for n, _ in graph.readers[node.output[0]]]
        if node.output[0] in graph.outputs:
            yield node, 'is an output of the graph'
        elif not readers or set(readers) != {'DequantizeLinear'}:
            yield node, f'read by {", ".join(readers) or "nobody"}'
