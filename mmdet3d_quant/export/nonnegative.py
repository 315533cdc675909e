"""Proof, op by op, that tensors of a graph are non-negative for every input.

A tensor is non-negative if the op that makes it never returns less than 0 (:data:`ALWAYS`), or
passes on the sign of its data (:data:`PASSING`) and all of these are non-negative. Inputs of the
graph, and whatever is not in the tables, count as possibly negative. OpenVINO's passes have tables
of their own (``engines/openvino/graph.py``), since operators have other names and attributes there.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from mmdet3d_quant.export.graph import ONNX_DOMAINS, stored_tensors

#: Ops that never return less than 0.
ALWAYS = frozenset({
    'Abs', 'Exp', 'HardSigmoid', 'Relu', 'Sigmoid', 'Softmax', 'Softplus', 'Sqrt',
})  # yapf: disable  # fmt: skip

#: Ops that return no less than 0 if what they read is no less, and how many of their inputs are
#: data (None: all). The others are sizes, axes, indices.
PASSING: dict[str, int | None] = {
    'Add': None, 'AveragePool': 1, 'Cast': 1, 'Concat': None, 'DepthToSpace': 1,
    'DequantizeLinear': 1, 'Dropout': 1, 'Expand': 1, 'Flatten': 1, 'Gather': 1,
    'GatherElements': 1, 'GlobalAveragePool': 1, 'GlobalMaxPool': 1, 'Identity': 1, 'LeakyRelu': 1,
    'MaxPool': 1, 'Mean': None, 'Min': None, 'Mul': None, 'Pad': 1, 'QuantizeLinear': 1,
    'ReduceMax': 1, 'ReduceMean': 1, 'ReduceMin': 1, 'ReduceSum': 1, 'Reshape': 1, 'Resize': 1,
    'Slice': 1, 'SpaceToDepth': 1, 'Split': 1, 'Squeeze': 1, 'Sum': None, 'Tile': 1, 'TopK': 1,
    'Transpose': 1, 'Unsqueeze': 1,
}  # yapf: disable  # fmt: skip
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


def nonnegative_tensors(graph: onnx.GraphProto) -> set[str]:
    """Finds the tensors that are never negative.

    Args:
        graph: Graph with sorted nodes, as ONNX demands; bodies of branches and loops are not
            visited.

    Returns:
        Set of the names of outputs of nodes and of constants, without empty (optional) ones.
    """
    values = {name: numpy_helper.to_array(t) for name, t in stored_tensors(graph).items()}
    known = {name for name, value in values.items() if _all_nonnegative(value)}
    for node in graph.node:
        if _is_nonnegative(node, known, values):
            known.update(o for o in node.output if o)
    return known


def _is_nonnegative(node: NodeProto, known: set[str], values: dict[str, np.ndarray]) -> bool:
    """True if the outputs of a node are non-negative.

    Args:
        node: The node.
        known: Names of the tensors before it that are non-negative.
        values: Constants by name.
    """
    kind = node.op_type
    if node.domain not in ONNX_DOMAINS:
        return False
    if kind in ALWAYS:
        return True
    if kind == 'Clip':
        return node.input[0] in known or _least(node, 1, values) >= 0
    if kind == 'Max':  # one non-negative input is enough
        return any(i in known for i in node.input)
    if kind == 'Where':
        return all(i in known for i in node.input[1:])
    if kind not in PASSING or not all(i in known for i in node.input[: PASSING[kind]]):
        return False
    attribute = {a.name: a for a in node.attribute}
    if kind == 'Resize':
        # Cubic kernels overshoot; a crop fills what lies outside with a value of its own.
        mode = attribute['mode'].s if 'mode' in attribute else b'nearest'
        crop = attribute.get('coordinate_transformation_mode')
        return mode in (b'nearest', b'linear') and (crop is None or crop.s != b'tf_crop_and_resize')
    if kind == 'Pad':
        given = len(node.input) > 2 and node.input[2]
        constant = 'mode' not in attribute or attribute['mode'].s == b'constant'
        return not (constant and given) or _least(node, 2, values) >= 0
    if kind == 'Cast':  # to integers, large values wrap round
        return attribute['to'].i in _FLOATS
    if kind in ('QuantizeLinear', 'DequantizeLinear'):  # 0 stays 0
        zero = values.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.uint8(0)
        return zero is not None and not np.any(zero) and node.input[1] in known
    return True


def _least(node: NodeProto, index: int, values: dict[str, np.ndarray]) -> float:
    """Minimum of an optional constant input; -infinity if it is absent or computed."""
    name = node.input[index] if len(node.input) > index else ''
    return float(values[name].min()) if name in values else -np.inf


def _all_nonnegative(value: np.ndarray) -> bool:
    """True if an array has numbers >= 0 only: no strings, no NaN."""
    return value.dtype.kind in 'fiub' and bool(np.all(value >= 0))
