"""Nodes that must compute in float32 because FP16 cannot hold their numbers.

They are found: from the largest magnitude of every tensor on example inputs, from the most that
sums inside a layer can reach, and from the types that ONNX has for an operator.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from mmdet3d_quant.export.graph import opset, stored_tensors
from mmdet3d_quant.export.half import LARGEST, LAYERS, LEAST, sum_bound, weight_of
from mmdet3d_quant.files.typed import tensor_types

#: How many times larger than on the example inputs a tensor may become.
MARGIN = 8


def odd_tensors(peaks: Mapping[str, float]) -> dict[str, str]:
    """Describes the tensors that FP16 cannot hold, by name."""
    odd = {}
    for name, peak in peaks.items():
        if not peak <= LARGEST / MARGIN:
            odd[name] = f'{name} reaches {peak:.3g}'
        elif 0 < peak < LEAST:
            odd[name] = f'{name} stays within {peak:.3g}, which FP16 rounds coarsely'
    return odd


def float32_nodes(model: onnx.ModelProto, peaks: Mapping[str, float]) -> dict[int, str]:
    """Finds the nodes that must compute in float32.

    Args:
        model: A graph typed float32.
        peaks: Largest magnitude by tensor.

    Returns:
        Dict of reasons by number of the node; Q and DQ nodes, which follow others, are left out.
    """
    graph, odd = model.graph, odd_tensors(peaks)
    stored = stored_tensors(graph)
    makers = {o: n for n in graph.node for o in n.output}
    types = tensor_types(model)
    shapes = {n: [d.dim_value or 1 for d in t.shape.dim] for n, t in types.items()}
    shapes.update((n, list(t.dims)) for n, t in stored.items())
    floats = {n for n, t in types.items() if t.elem_type == TensorProto.FLOAT}
    found = {}
    shares = set()
    for node in graph.node:
        axis = next((a.i for a in node.attribute if a.name == 'axis'), -1)
        rank = len(shapes.get(node.output[0], ()))
        if node.op_type == 'Softmax' and rank and axis % rank == rank - 1:
            shares.add(node.output[0])
    for number, node in enumerate(graph.node):
        if node.op_type in ('Constant', 'QuantizeLinear', 'DequantizeLinear'):
            continue
        constants = {
            i: w
            for i, n in enumerate(node.input)
            if (w := weight_of(n, makers, stored)) is not None
        }
        reason = next(
            (
                odd[name]
                for i, name in enumerate((*node.input, *node.output))
                if name in odd and i not in constants
            ),
            '',
        )
        reason = reason or next(
            (
                f'ONNX has no FP16 for {node.op_type}'
                for i, name in enumerate(node.output)
                if name in floats and not takes_half(node, opset(model), i, output=True)
            ),
            '',
        )
        reason = reason or _odd_constant(node, constants)
        in_int8 = node.op_type in LAYERS and all(
            n in makers and makers[n].op_type == 'DequantizeLinear' for n in node.input[:2]
        )
        if not reason and not in_int8:
            bound, how = sum_bound(node, peaks, shapes, constants.get(1), shares)
            reason = f'sums up to {bound:.3g}: {how}' if bound > LARGEST else ''
        if reason:
            found[number] = reason
    return found


def _odd_constant(node: NodeProto, constants: Mapping[int, np.ndarray]) -> str:
    """Describes a constant operand that FP16 cannot hold; of layers only the weight."""
    for i, value in constants.items():
        if value.dtype.kind != 'f' or (node.op_type in LAYERS and i != 1):
            continue
        sizes = np.abs(value[np.isfinite(value) & (value != 0)])
        if sizes.size and (sizes.max() > LARGEST or sizes.max() < LEAST):
            return f'{node.input[i]} is {sizes.max():.3g}'
    return ''


def takes_half(node: NodeProto, version: int, index: int, output: bool = False) -> bool:
    """Whether ONNX lets an input or output of a node be FP16; of foreign operators all may.

    Args:
        node: The node.
        version: Its opset.
        index: Of the input or output.
        output: Which of the two.
    """
    if not onnx.defs.has(node.op_type, version, node.domain):
        return True
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    formals = schema.outputs if output else schema.inputs
    kind = formals[min(index, len(formals) - 1)].type_str
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    return 'tensor(float16)' in allowed.get(kind, [kind])
