"""Rules of scales per channel: along which axis, how many, and of which tensors."""

from __future__ import annotations

from mmdet3d_quant.check.lint.graph import CONVOLUTIONS, PRODUCTS, Graph
from mmdet3d_quant.check.lint.rules.helpers import all_pairs
from mmdet3d_quant.check.lint.rules.registry import Found, rule


@rule(
    'Q28',
    'weight scales along the wrong axis',
    'engines join scales of output channels with the layer: axis 0 of Conv, the last of a matrix; '
    'for ConvTranspose they do not agree on the axis, nor do their makers',
    'export with the axis of the output channels; ConvTranspose with one scale, or float',
)
def _axis(graph: Graph) -> Found:
    for node in graph.layers():
        pair = graph.weight_pair(node)
        if pair is None or pair.scale is None or pair.scale.size == 1:
            continue
        if pair.axis != graph.output_axis(node):
            case = 'product' if node.op_type in PRODUCTS else node.op_type
            yield node, f'axis {pair.axis} of {node.op_type}', case


@rule(
    'Q29',
    'as many scales as there are no channels',
    'the file is broken; engines refuse it',
    'one scale per output channel, in one dimension',
)
def _count(graph: Graph) -> Found:
    for pair in all_pairs(graph):
        shape = graph.shapes.get(pair.source)
        if pair.scale is None or not shape or -1 in shape or pair.blocks:
            continue
        if pair.dims > 1:
            yield pair.dq, f'scales in {pair.dims} dimensions', 'dimensions'
        elif pair.scale.size > 1 and not (
            -len(shape) <= pair.axis < len(shape) and shape[pair.axis] == pair.scale.size
        ):
            yield pair.dq, f'{pair.scale.size} scales for a tensor of shape {shape}', 'number'


@rule(
    'Q30',
    'activation with scales per channel',
    'TensorRT takes one scale per activation tensor',
    'calibrate activations per tensor',
)
def _per_channel(graph: Graph) -> Found:
    for pair in all_pairs(graph):
        if pair.scale is not None and pair.scale.size > 1 and not graph.holds_weight(pair):
            yield pair.dq, f'{pair.scale.size} scales', ''


@rule(
    'Q37',
    'other number of zero points than of scales',
    'the file is broken; engines refuse it',
    'as many zero points as scales',
)
def _zero_points(graph: Graph) -> Found:
    for node in graph.of('QuantizeLinear', 'DequantizeLinear'):
        scale, zero = graph.grid(node)
        if scale is not None and zero is not None and scale.size != zero.size:
            yield node, f'{zero.size} zero points, {scale.size} scales', ''


@rule(
    'Q38',
    'one scale in a dimension of its own',
    'shape (1,) may be taken for scales per channel',
    'a scale without dimensions, of shape ()',
)
def _one(graph: Graph) -> Found:
    layers = [node for node in graph.layers() if node.op_type in CONVOLUTIONS]
    read = {pair.dq.output[0] for node in layers for pair in graph.read_pairs(node)}
    weights = {pair.dq.output[0] for pair in map(graph.weight_pair, layers) if pair is not None}
    for pair in all_pairs(graph):
        if pair.scale is None or pair.scale.size > 1 or pair.dims != 1:
            continue
        case = 'elsewhere'
        if pair.dq.output[0] in read:
            case = 'activation of a convolution'
        elif pair.dq.output[0] in weights and graph.types.get(pair.dq.input[1]) == 'FLOAT16':
            case = 'FP16 weight of a convolution'
        yield pair.dq, f'of {pair.source}', case
