"""Transposed convolutions as convolutions to more channels, and a shuffle of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from mmdet3d_quant.export.graph import axis_of, stored_tensors


def to_depth_to_space(graph: onnx.GraphProto, names: Mapping[str, str]) -> dict[str, str]:
    """Rewrites quantized transposed convolutions where that costs little or nothing, in place.

    * With a square kernel as large as its stride, every output value is the product of one input
      position with one place of the kernel: a 1x1 convolution to k * k times the channels, which
      DepthToSpace lays out. Of stride 1 it is the convolution alone.
    * Depthwise, and with a kernel of twice its even stride, as those that interpolate: a depthwise
      3x3 convolution to as many channels, of which each reads two places in each direction. The
      others are zeros, with few products in comparison to the bytes of float.

    Weights, their scales and the bias are repeated or moved, so integers and sums are the same; the
    scales are then those of a convolution, along axis 0, which every engine takes. Others stay.

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
        if (
            pair is None
            or weight is None
            or not (_tiles(node, weight) or _interpolates(node, weight))
        ):
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
    stride = _stride(node, weight)
    return stride == weight.dims[-1] and _attributes(node)['group'] == 1 and _pads(node) == {0}


def _interpolates(node: NodeProto, weight: onnx.TensorProto) -> bool:
    """True if every channel is its own, and outputs of two neighbours in a row overlap by half."""
    stride, alone = _stride(node, weight), weight.dims[1] == 1
    depthwise = alone and _attributes(node)['group'] == weight.dims[0]
    halves = stride % 2 == 0 and 2 * stride == weight.dims[-1]
    return depthwise and halves and _pads(node) == {stride // 2}


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {'group': 1, **{a.name: helper.get_attribute_value(a) for a in node.attribute}}


def _pads(node: NodeProto) -> set[int]:
    return set(_attributes(node).get('pads', [0]))


def _stride(node: NodeProto, weight: onnx.TensorProto) -> int:
    """The stride in both directions, 0 of what is not rewritten whatever its kernel."""
    attributes = _attributes(node)
    kernel, strides = list(weight.dims[2:]), list(attributes.get('strides', [1, 1]))
    plain = (
        len(weight.dims) == 4
        and kernel[0] == kernel[1]
        and strides[0] == strides[1]
        and not any(attributes.get('output_padding', []))
        and all(d == 1 for d in attributes.get('dilations', []))
        and attributes.get('auto_pad', b'NOTSET') in (b'NOTSET', b'VALID')
        and 'output_shape' not in attributes
    )
    return strides[0] if plain else 0


def _by_place(weight: np.ndarray, size: int) -> np.ndarray:
    """Weights (C, 1, 2 s, 2 s) as those (C s s, 1, 3, 3) by place in a square of outputs."""
    channels = len(weight)
    moved = np.zeros((channels, size, size, 3, 3), weight.dtype)
    # Output s * m + r reads input m - 1 + t at the kernel's place s * (1 - t) + r + s / 2.
    taps = [(r, t, size * (1 - t) + r + size // 2) for r in range(size) for t in range(3)]
    inside = [(r, t, at) for r, t, at in taps if 0 <= at < 2 * size]
    for row, up, y in inside:
        for column, left, x in inside:
            moved[:, row, column, up, left] = weight[:, 0, y, x]
    return moved.reshape(-1, 1, 3, 3)


def _rewritten(
    node: NodeProto, pair: tuple[NodeProto, NodeProto], values: dict[str, np.ndarray]
) -> tuple[list[NodeProto], list[onnx.TensorProto]]:
    """The new nodes of one layer, under the old names, and their constants."""
    q, dq = pair
    weight = values[q.input[0]]
    size = _attributes(node).get('strides', [1])[0]
    tiled = weight.shape[2] == size
    tensors: dict[str, np.ndarray] = {}

    def put(name: str, value: np.ndarray) -> str:
        own = f'{node.output[0]}.{name}'  # of this layer, should two share a weight
        tensors[own] = np.ascontiguousarray(value)
        return own

    def repeated(name: str) -> str:
        value = values[name]
        if not value.ndim:
            return name
        many = np.tile if tiled else np.repeat  # by place, or by channel
        return put(name, many(value, size * size))

    per_channel = values[q.input[1]].ndim > 0
    if per_channel and axis_of(q) != 1:
        raise ValueError(f'{node.name}: scales along axis {axis_of(q)}, not the output channels')
    if tiled:
        moved = weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0], 1, 1)
        form: dict[str, Any] = dict(kernel_shape=[1, 1])
    else:
        moved = _by_place(weight, size)
        form = dict(kernel_shape=[3, 3], pads=[1] * 4, group=len(weight))
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
        helper.make_node('Conv', [node.input[0], real, *bias], [made], name=node.name, **form),
    ]
    if size > 1:
        tiles = dict(name=f'{node.name}.tiles', blocksize=size, mode='DCR' if tiled else 'CRD')
        nodes.append(helper.make_node('DepthToSpace', [wide], [node.output[0]], **tiles))
    return nodes, [numpy_helper.from_array(v, n) for n, v in tensors.items()]
