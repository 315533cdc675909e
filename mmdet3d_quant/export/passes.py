"""Graph passes that keep results: clean-up, constant shapes, opsets, storage of weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import cast

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from mmdet3d_quant.core.formats import STORED
from mmdet3d_quant.export.graph import (
    ONNX_DOMAINS,
    axis_of,
    decoded,
    names_read,
    opset,
    stored_tensors,
)
from mmdet3d_quant.export.half import require_weights


def drop_identities(graph: onnx.GraphProto) -> None:
    """Removes Identity nodes of constants; their readers read the constants.

    torch stores equal parameters once and copies them with Identity nodes. Those that make an
    output of the graph, or are read inside a branch, stay.
    """
    constants = {i.name for i in graph.initializer}
    bound = {o.name for o in graph.output}
    bound.update(*(names_read(n) - set(n.input) for n in graph.node))
    source = {
        n.output[0]: n.input[0]
        for n in graph.node
        if n.op_type == 'Identity' and n.input[0] in constants and n.output[0] not in bound
    }
    kept = [n for n in graph.node if n.output[0] not in source]
    for node in kept:
        node.input[:] = [source.get(i, i) for i in node.input]
    del graph.node[:]
    graph.node.extend(kept)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Removes constants without readers, and what computes shapes that nothing reads."""
    kinds = {'Constant', *_SHAPE_OPS}
    kept, count = list(graph.node), -1
    while count != len(kept):
        count = len(kept)
        read = {o.name for o in graph.output}.union(*map(names_read, kept))
        kept = [n for n in kept if n.op_type not in kinds or read.intersection(n.output)]
    stored = [i for i in graph.initializer if i.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(stored)


#: Ops that compute shapes out of shapes.
_SHAPE_OPS = frozenset({
    'Add', 'Cast', 'Concat', 'ConstantOfShape', 'Div', 'Equal', 'Expand', 'Gather', 'Identity',
    'Mod', 'Mul', 'Range', 'Reshape', 'Shape', 'Slice', 'Squeeze', 'Sub', 'Transpose', 'Unsqueeze',
    'Where',
})  # yapf: disable  # fmt: skip
#: Number formats by ONNX's type.
_FORMATS = {TensorProto.DataType.Value(name): fmt for name, fmt in STORED.items()}
#: Larger constants are weights, not shapes.
_SHAPE_SIZE = 64


def fold_shapes(model: onnx.ModelProto) -> None:
    """Constant-folds the computation of shapes, in place; for graphs with static shapes.

    torch's tracer writes every ``x.shape`` as a chain of nodes. Engines fold them too, but tools
    that only infer shapes stop at them. Passes are repeated, since each makes more shapes known.
    """
    stored = stored_tensors(model.graph)
    values = {n: numpy_helper.to_array(t) for n, t in stored.items() if _is_small(t)}
    imported = onnx.helper.make_opsetid('', opset(model))
    while True:
        shapes = _known_shapes(model)
        kept: list[onnx.NodeProto] = []
        folded: dict[str, np.ndarray] = {}
        for node in model.graph.node:
            if node.op_type == 'Shape' and node.input[0] in shapes and not node.attribute:
                folded[node.output[0]] = np.asarray(shapes[node.input[0]], np.int64)
            elif node.op_type in _SHAPE_OPS and all(i in values for i in node.input):
                outputs = ReferenceEvaluator(_alone(node, imported)).run(
                    None, {i: values[i] for i in node.input}
                )
                (value,) = cast('list[np.ndarray]', outputs)  # a dict is for intermediate ones
                if value.size > _SHAPE_SIZE:
                    kept.append(node)
                    continue
                if not value.size:  # stays a node: OpenVINO refuses constants without elements
                    values[node.output[0]] = value
                    kept.append(node)
                    continue
                folded[node.output[0]] = value
            else:
                kept.append(node)
                continue
            values[node.output[0]] = folded[node.output[0]]
        if not folded:
            break
        del model.graph.node[:]
        model.graph.node.extend(kept)
        model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(v), n) for n, v in folded.items()
        )
    drop_unused(model.graph)


def _is_small(tensor: onnx.TensorProto) -> bool:
    """True if a constant may be a shape: few elements, and no quantized weights."""
    return int(np.prod(tensor.dims)) <= _SHAPE_SIZE and tensor.data_type not in _FORMATS


def _known_shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Infers the static shapes of tensors, by name."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {i.name: list(i.dims) for i in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField('shape') and all(d.HasField('dim_value') for d in tensor.shape.dim):
            shapes[value.name] = [d.dim_value for d in tensor.shape.dim]
    return shapes


def _alone(node: onnx.NodeProto, imported: onnx.OperatorSetIdProto) -> onnx.ModelProto:
    """Wraps one node in a model without types."""
    inputs = [onnx.helper.make_empty_tensor_value_info(i) for i in dict.fromkeys(node.input)]
    outputs = [onnx.helper.make_empty_tensor_value_info(o) for o in node.output]
    graph = onnx.helper.make_graph([node], 'node', inputs, outputs)
    return onnx.helper.make_model(graph, opset_imports=[imported])


def to_opset(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """Converts a model to another opset by ONNX's own converter; the IR version follows."""
    if opset(model) == version:
        return model
    props = {p.key: p.value for p in model.metadata_props}
    converted = onnx.version_converter.convert_version(model, version)
    onnx.helper.set_model_props(converted, props)
    known = [o for o in converted.opset_import if o.domain in ONNX_DOMAINS]
    needed = onnx.helper.find_min_ir_version_for(known)
    converted.ir_version = max(model.ir_version, needed)
    return converted


def store_int8_weights(graph: onnx.GraphProto) -> None:
    """Stores quantized weights as INT8 or FP8 with a DequantizeLinear, a quarter of the size.

    Each QuantizeLinear of a constant is computed as ONNX defines it: division in float32, rounding
    half to even, saturation. Weights that several layers read are stored once per scale. Those
    with a zero point other than 0, or of a format that is not stored, stay as they are.
    """
    constants = stored_tensors(graph)
    kept, stored = [], {}
    for node in graph.node:
        if node.op_type != 'QuantizeLinear' or not _is_stored(node, constants):
            kept.append(node)
            continue
        weight, scale = (numpy_helper.to_array(constants[i]) for i in node.input[:2])
        if scale.ndim:
            axis = axis_of(node) % weight.ndim
            scale = scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        kind, name = constants[node.input[2]].data_type, node.output[0]
        raw = _FORMATS[kind].encoded(weight / scale)
        stored[name] = onnx.helper.make_tensor(name, kind, weight.shape, raw, raw=True)
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(stored.values())
    drop_unused(graph)


def _is_stored(node: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    """True if all that a QuantizeLinear reads is constant, its zero point 0 of a known format."""
    if len(node.input) < 3 or not all(i in constants for i in node.input):
        return False
    zero = constants[node.input[2]]
    return zero.data_type in _FORMATS and not decoded(zero).any()


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Converts weights and arithmetic to FP16 by ONNX Runtime's tool; inputs and outputs stay.

    Raises:
        ExportError: If FP16 cannot hold a weight.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    require_weights(model.graph)  # the tool would clip them
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about values that are clamped to FP16's least
        converted = convert_float_to_float16(model, keep_io_types=True)
    sort_nodes(converted.graph)  # the tool appends its casts at the end
    return converted


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Sorts the nodes topologically, as ONNX demands, in place."""
    maker = {o: i for i, node in enumerate(graph.node) for o in node.output}
    order: list[int] = []
    done: set[int] = set()
    for last in range(len(graph.node)):
        waiting = [last]
        while waiting:
            index = waiting[-1]
            before = {maker[i] for i in names_read(graph.node[index]) if i in maker}
            before -= done | {index}
            if before:
                waiting.extend(sorted(before, reverse=True))
                continue
            waiting.pop()
            if index not in done:
                done.add(index)
                order.append(index)
    nodes = [graph.node[i] for i in order]
    del graph.node[:]
    graph.node.extend(nodes)


def is_quantized(model: onnx.ModelProto) -> bool:
    """True if the graph has a DequantizeLinear."""
    return any(n.op_type == 'DequantizeLinear' for n in model.graph.node)
