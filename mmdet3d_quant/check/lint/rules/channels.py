"""Rules of scales per channel: along which axis, how many, and of which tensors."""

from __future__ import annotations

from mmdet3d_quant.check.lint.graph import Graph
from mmdet3d_quant.check.lint.rules.helpers import all_pairs
from mmdet3d_quant.check.lint.rules.registry import Found, rule


@rule(
    'Q28',
    'weight scales along the wrong axis',
    'TensorRT takes the output channels only: axis 0 of Conv, axis 1 of ConvTranspose',
    'export with the axis of the output channels',
)
def _axis(graph: Graph) -> Found:
    for node in graph.layers():
        pair = graph.weight_pair(node)
        if pair is None or pair.scale is None or pair.scale.size == 1:
            continue
        if pair.axis != graph.output_axis(node):
            yield node, f'axis {pair.axis} of {node.op_type}'


@rule(
    'Q29',
    'as many scales as there are no channels',
    'the file is broken; engines refuse it',
    'one scale per output channel',
)
def _count(graph: Graph) -> Found:
    for node in graph.layers():
        pair = graph.weight_pair(node)
        shape = graph.shapes.get(pair.source) if pair else None
        if not pair or pair.scale is None or pair.scale.size == 1 or not shape:
            continue
        if not -len(shape) <= pair.axis < len(shape) or shape[pair.axis] != pair.scale.size:
            yield node, f'{pair.scale.size} scales for a weight of shape {shape}'


@rule(
    'Q30',
    'activation with scales per channel',
    'TensorRT takes one scale per activation tensor',
    'calibrate activations per tensor',
)
def _per_channel(graph: Graph) -> Found:
    for pair in all_pairs(graph):
        many = pair.scale is not None and pair.scale.size > 1
        if many and not graph.holds_weight(pair):
            yield pair.dq, f'{pair.scale.size} scales' if pair.scale is not None else ''
