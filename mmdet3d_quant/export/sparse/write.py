"""Writing of a program as the ONNX file that libspconv reads.

Names, types and layouts follow NVIDIA's exporter (`CUDA-BEVFusion/qat/lean/exptool.py`) and the
parser of its engine. The operators are in no standard, so `onnx.checker` refuses these files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import onnx
from onnx import TensorProto, helper
from torch import Tensor

from mmdet3d_quant.export.sparse.check import check
from mmdet3d_quant.export.sparse.program import (
    Add,
    Op,
    Program,
    Relu,
    Reshape,
    ScatterDense,
    SparseConv,
    Transpose,
)
from mmdet3d_quant.files.outputs import whole
from mmdet3d_quant.version import __version__

#: What onnx 1.12 writes, with which NVIDIA's exporter runs.
IR_VERSION = 8
OPSET = 11
DOMAIN = 'ai.onnx'


def write_program(program: Program, path: str | Path) -> onnx.ModelProto:
    """Writes a program; equal programs give equal bytes.

    Args:
        program: The network.
        path: File to write; it appears whole or not at all.

    Returns:
        The model written.

    Raises:
        ScnError: If the program is not one that libspconv computes.
        OSError: If the file cannot be written.
    """
    check(program)
    model = as_onnx(program)
    with whole(path) as tmp:
        onnx.save(model, str(tmp))
    return model


def as_onnx(program: Program) -> onnx.ModelProto:
    """Makes the model: its input (1, C), its output, one node per operator, weights in FP16.

    The number of voxels is said to be 1, as in NVIDIA's files; libspconv takes any number.
    """
    numbers = {op.name: i for i, op in enumerate(program.convs)}
    weights = [
        _initializer(f'spconv{numbers[op.name]}.{what}', values)
        for op in program.convs
        for what, values in (('weight', op.weight), ('bias', op.bias))
    ]
    nodes = [_NODES[type(op)](op, numbers.get(op.name, 0)) for op in program.ops]
    graph = helper.make_graph(
        nodes,
        'scn',
        [_value(program.input, (1, program.channels))],
        [_value(program.output, program.output_shape)],
        weights,
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_operatorsetid(DOMAIN, OPSET)],
        ir_version=IR_VERSION,
        producer_name='mmdet3d_quant',
        producer_version=__version__,
    )


def _value(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT16, list(shape))


def _initializer(name: str, values: Tensor) -> onnx.TensorProto:
    raw = values.cpu().numpy().astype('<f2').tobytes()
    return helper.make_tensor(name, TensorProto.FLOAT16, list(values.shape), raw, raw=True)


def _node(kind: str, op: Op, inputs: list[str], **attributes: Any) -> onnx.NodeProto:
    layer = getattr(op, 'layer', '') or None
    given = {name: value for name, value in attributes.items() if value is not None}
    return helper.make_node(kind, inputs, [op.output], op.name, doc_string=layer, **given)


def _conv(op: SparseConv, number: int) -> onnx.NodeProto:
    inputs = [*op.inputs, f'spconv{number}.weight', f'spconv{number}.bias']
    out, inner = op.weight.shape[0], op.weight.shape[-1]
    return _node(
        'SparseConvolution',
        op,
        inputs,
        ndim=3,
        in_channels=inner,
        out_channels=out,
        input_spatial_shape=op.grid,
        output_spatial_shape=op.output_grid,
        input_shape=(1, inner),
        output_shape=(1, out),
        kernel_size=op.kernel,
        stride=op.stride,
        padding=op.padding,
        dilation=op.dilation,
        output_padding=(0, 0, 0),
        groups=1,
        transposed=0,
        inverse=0,
        subm=int(op.subm),
        output_bound=op.output_bound,
        rulebook=op.rulebook,
        activation='ReLU' if op.relu else 'None',
        input_dynamic_range=op.input_range,
        weight_dynamic_ranges=op.weight_ranges,
        precision=op.precision,
        output_precision=op.output_precision,
    )


def _add(op: Add, number: int) -> onnx.NodeProto:
    return _node(
        'Add',
        op,
        list(op.inputs),
        input0_dynamic_range=op.ranges[0],
        input1_dynamic_range=op.ranges[1],
        precision=op.precision,
        output_precision=op.output_precision,
    )


def _scatter(op: ScatterDense, number: int) -> onnx.NodeProto:
    return _node(
        'ScatterDense',
        op,
        list(op.inputs),
        input_spatial_shape=op.grid,
        format=op.order,
        output_shape=op.shape,
    )


_NODES: dict[type, Callable[[Any, int], onnx.NodeProto]] = {
    SparseConv: _conv,
    Add: _add,
    Relu: lambda op, number: _node('Relu', op, list(op.inputs)),
    ScatterDense: _scatter,
    Transpose: lambda op, number: _node('Transpose', op, list(op.inputs), dims=op.dims),
    Reshape: lambda op, number: _node('Reshape', op, list(op.inputs), dims=op.dims),
}
