"""Transposed convolutions whose kernel is their stride, as 1x1 convolutions and a shuffle.

Of stride 1 they are 1x1 convolutions, without a shuffle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from mmdet3d_quant.export.graph import axis_of, stored_tensors


def to_depth_to_space(graph: onnx.GraphProto, names: Mapping[str, str]) -> dict[str, str]:
    """Rewrites quantized transposed convolutions whose outputs do not overlap, in place.

    With a square kernel as large as its stride, every output value is the product of one input
    position with one place of the kernel: a 1x1 convolution to k * k times the channels, which
    DepthToSpace lays out, if k is not 1. Weights, their scales and the bias are repeated or moved,
    so integers and sums are the same; the scales are then those of a convolution, along axis 0,
    which every engine takes. Others stay: groups, padding, dilation, another stride.

    Args:
        graph: Weights are stored in float with a Q/DQ pair.
        names: Names of quantizers by output of their QuantizeLinear.

    Returns:
        Dict of the same kind for the graph as it is now.
    """
    stored = stored_tensors(graph)
    producer = {o: n for n in graph.node for o in n.output}
    nodes: list[NodeProto] = []
    replaced: list[NodeProto] = []
    renamed: dict[str, str] = {}
    for node in graph.node:
        pair = _weight_pair(node, producer) if node.op_type == 'ConvTranspose' else None
        weight = stored.get(pair[0].input[0]) if pair else None
        if pair is None or weight is None or not _tiles(node, weight):
            nodes.append(node)
            continue
        constants = [n for n in (*pair[0].input, *node.input[2:]) if n in stored]
        values = {name: numpy_helper.to_array(stored[name]) for name in constants}
        new, tensors = _rewritten(node, pair, values)
        graph.initializer.extend(tensors)
        nodes += new
        replaced += pair
        renamed[new[0].output[0]] = pair[0].output[0]
    for old in reversed(replaced):  # a DequantizeLinear before its QuantizeLinear
        if not any(output in n.input for n in nodes for output in old.output):
            nodes = [n for n in nodes if n is not old]
    if renamed:
        del graph.node[:]
        graph.node.extend(nodes)
    made = {output for n in nodes for output in n.output}
    gone = set(renamed.values()) - made
    left = {output: name for output, name in names.items() if output not in gone}
    return {**left, **{new: names[old] for new, old in renamed.items()}}


def _weight_pair(
    node: NodeProto, producer: dict[str, NodeProto]
) -> tuple[NodeProto, NodeProto] | None:
    """The QuantizeLinear and DequantizeLinear of a layer's weight."""
    dq = producer.get(node.input[1])
    if dq is None or dq.op_type != 'DequantizeLinear':
        return None
    q = producer.get(dq.input[0])
    return (q, dq) if q is not None and q.op_type == 'QuantizeLinear' else None


def _tiles(node: NodeProto, weight: onnx.TensorProto) -> bool:
    """True if outputs of neighbouring inputs lie side by side in squares."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if len(weight.dims) != 4:
        return False
    kernel = list(weight.dims[2:])
    return (
        kernel[0] == kernel[1]
        and list(attributes.get('strides', [1, 1])) == kernel
        and attributes.get('group', 1) == 1
        and not any(attributes.get('pads', []))
        and not any(attributes.get('output_padding', []))
        and all(d == 1 for d in attributes.get('dilations', []))
        and attributes.get('auto_pad', b'NOTSET') in (b'NOTSET', b'VALID')
        and 'output_shape' not in attributes
    )


def _rewritten(
    node: NodeProto, pair: tuple[NodeProto, NodeProto], values: dict[str, np.ndarray]
) -> tuple[list[NodeProto], list[onnx.TensorProto]]:
    """The new nodes of one layer, under the old names, and their constants."""
    q, dq = pair
    weight = values[q.input[0]]
    size = weight.shape[2]
    tensors: dict[str, np.ndarray] = {}

    def put(name: str, value: np.ndarray) -> str:
        own = f'{node.output[0]}.{name}'  # of this layer, should two share a weight
        tensors[own] = np.ascontiguousarray(value)
        return own

    def repeated(name: str) -> str:
        value = values[name]
        return put(name, np.tile(value, size * size)) if value.ndim else name

    per_channel = values[q.input[1]].ndim > 0
    if per_channel and axis_of(q) != 1:
        raise ValueError(f'{node.name}: scales along axis {axis_of(q)}, not the output channels')
    moved = weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0], 1, 1)
    grid = [repeated(name) for name in q.input[1:]]
    axis: dict[str, Any] = dict(axis=0) if per_channel else {}
    quantized, real, wide = (f'{node.output[0]}.{what}' for what in ('quantized', 'weight', 'wide'))
    bias = [repeated(name) for name in node.input[2:]]
    made = node.output[0] if size == 1 else wide
    nodes = [
        helper.make_node(
            'QuantizeLinear', [put(q.input[0], moved), *grid], [quantized], name=q.name, **axis
        ),
        helper.make_node('DequantizeLinear', [quantized, *grid], [real], name=dq.name, **axis),
        helper.make_node(
            'Conv', [node.input[0], real, *bias], [made], name=node.name, kernel_shape=[1, 1]
        ),
    ]
    if size > 1:
        tiles: dict[str, Any] = dict(name=f'{node.name}.tiles', blocksize=size, mode='DCR')
        nodes.append(helper.make_node('DepthToSpace', [wide], [node.output[0]], **tiles))
    return nodes, [numpy_helper.from_array(v, n) for n, v in tensors.items()]
