"""Largest magnitude of every float tensor of a graph on example inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from mmdet3d_quant.export.graph import opset
from mmdet3d_quant.export.pairs import ExportError
from mmdet3d_quant.files.typed import tensor_types


def peaks(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Computes the largest magnitude of every float32 tensor that is not stored.

    The graph runs once in ONNX Runtime with two more nodes per tensor, so that no tensor is kept.

    Args:
        model: A graph typed float32.
        inputs: Arrays by name.

    Returns:
        Dict by name of the tensor; tensors without elements are left out.

    Raises:
        ExportError: If the graph does not run.
    """
    from mmdet3d_quant.engines import EngineError, ONNXRuntime

    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    graph = probed.graph
    made = {o for n in graph.node if n.op_type != 'Constant' for o in n.output}
    made |= {i.name for i in graph.input}
    names = [
        name
        for name, kind in tensor_types(model).items()
        if name in made
        and kind.elem_type == TensorProto.FLOAT
        and not any(d.HasField('dim_value') and d.dim_value == 0 for d in kind.shape.dim)
    ]
    del graph.output[:]
    for i, name in enumerate(names):
        graph.node.append(helper.make_node('Abs', [name], [f'peak_abs_{i}']))
        graph.node.append(
            helper.make_node('ReduceMax', [f'peak_abs_{i}'], [f'peak_{i}'], keepdims=0)
        )
        graph.output.append(helper.make_tensor_value_info(f'peak_{i}', TensorProto.FLOAT, []))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'probed.onnx'
        onnx.save(probed, str(path))
        try:
            found = ONNXRuntime(path)(dict(inputs))
        except EngineError as err:
            raise ExportError(f'the graph does not run (opset {opset(model)}): {err}') from err
    return {name: float(found[f'peak_{i}']) for i, name in enumerate(names)}
