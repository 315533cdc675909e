"""Strongly typed files, as engines see them: what says so, and how a CPU computes them.

A CPU has few kernels for FP16. What a GPU computes is had by float32 kernels and two casts behind
every tensor that the file has in FP16. (ONNX Runtime by itself leaves such roundings out where it
puts casts around a kernel that it lacks.)
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mmdet3d_quant.files.metadata import STRONG, TYPING_KEY


def is_strong(file: str | Path | onnx.ModelProto) -> bool:
    """Checks whether an ONNX file, or one that is loaded, says that it is strongly typed."""
    if not isinstance(file, onnx.ModelProto):
        file = onnx.load(str(file), load_external_data=False)
    return any(p.key == TYPING_KEY and p.value == STRONG for p in file.metadata_props)


def tensor_types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Infers type and shape of inputs, outputs and what nodes make, by name."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return {v.name: v.type.tensor_type for v in values}


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """Types a strongly typed graph float32, with its tensors rounded to FP16 where they were FP16.

    Args:
        model: A graph without subgraphs; left unchanged.

    Returns:
        The model, its inputs and outputs float32.
    """
    types = tensor_types(model)
    halves = {n for n, t in types.items() if t.elem_type == TensorProto.FLOAT16}
    return round_tensors(to_float32(model), halves)


def round_tensors(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """Rounds tensors of a graph to FP16, by two casts each, in place.

    Args:
        model: A graph typed float32, without subgraphs.
        names: Tensors to round; what a DequantizeLinear makes stays, since engines read integers.

    Returns:
        ``model``.
    """
    graph, wanted = model.graph, set(names)
    nodes: list[NodeProto] = []
    read = {}
    for value in graph.input:
        if value.name in wanted:
            read[value.name] = f'{value.name}_rounded'
            nodes += _casts(value.name, read[value.name])
    for node in graph.node:
        node.input[:] = [read.get(i, i) for i in node.input]
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name in wanted and node.op_type not in ('Constant', 'DequantizeLinear'):
                node.output[i] = f'{name}_exact'
                nodes += _casts(node.output[i], name)
    nodes = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _casts(source: str, result: str) -> list[NodeProto]:
    half = f'{result}_in_half'
    return [
        helper.make_node('Cast', [source], [half], f'{result}_to_half', to=TensorProto.FLOAT16),
        helper.make_node('Cast', [half], [result], f'{result}_from_half', to=TensorProto.FLOAT),
    ]


def to_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Types a graph float32 where it is FP16; stored numbers stay as they are.

    Args:
        model: A graph without subgraphs; left unchanged.

    Returns:
        The model; casts between the two types are left, and do nothing.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    model = result
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    attributes = [a for node in model.graph.node for a in node.attribute]
    for tensor in (*model.graph.initializer, *(a.t for a in attributes if a.HasField('t'))):
        if tensor.data_type == TensorProto.FLOAT16:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for attribute in attributes:
        if attribute.name in ('to', 'dtype') and attribute.i == TensorProto.FLOAT16:
            attribute.i = TensorProto.FLOAT
    return model
