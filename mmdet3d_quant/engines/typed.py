"""Strongly typed files, as engines see them: what says so, and how one is typed float32 again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from mmdet3d_quant.files.metadata import STRONG, TYPING_KEY


def is_strong(path: str | Path) -> bool:
    """Checks whether an ONNX file says that it is strongly typed."""
    props = onnx.load(str(path), load_external_data=False).metadata_props
    return any(p.key == TYPING_KEY and p.value == STRONG for p in props)


def to_float32(path: str | Path) -> onnx.ModelProto:
    """Reads a file with all that is FP16 typed float32; stored numbers stay as they are.

    Args:
        path: ONNX file without subgraphs.

    Returns:
        The model; casts between the two types are left, and do nothing.
    """
    model = onnx.load(str(path))
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
