"""Q/DQ pairs of FP8: torch's exporter has no such type, so they are traced as INT8."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

import onnx
from onnx import TensorProto, helper

from mmdet3d_quant.export.graph import stored_tensors

FP8_TYPE = TensorProto.FLOAT8E4M3FN


def to_fp8(graph: onnx.GraphProto, names: Mapping[str, str], chosen: Collection[str]) -> None:
    """Gives pairs zero points of FLOAT8E4M3FN, in place; scales stay.

    Args:
        graph: With zero points that are stored, all zero; of opset 19 or later.
        names: Name of the quantizer by output of the QuantizeLinear.
        chosen: Names of the quantizers that are FP8.
    """
    stored = stored_tensors(graph)
    made: dict[tuple[int, ...], str] = {}
    quantized = {output for output, name in names.items() if name in chosen}
    for value in graph.value_info:
        if value.name in quantized:
            value.type.tensor_type.elem_type = FP8_TYPE
    for node in graph.node:
        if node.op_type not in ('QuantizeLinear', 'DequantizeLinear'):
            continue
        if not quantized.intersection((node.input[0], node.output[0])):
            continue
        shape = tuple(stored[node.input[1]].dims)
        if shape not in made:
            made[shape] = '_'.join(['fp8_zero', *map(str, shape)])
            zeros = helper.make_tensor(made[shape], FP8_TYPE, shape, bytes(prod(shape)), raw=True)
            graph.initializer.append(zeros)
        node.input[2] = made[shape]
