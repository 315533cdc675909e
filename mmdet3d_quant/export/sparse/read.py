"""Reading of a file for libspconv, ours or NVIDIA's, as a program."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Callable

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper
from torch import Tensor

from mmdet3d_quant.export.sparse.check import check
from mmdet3d_quant.export.sparse.program import (
    Add,
    Axes,
    Op,
    Program,
    Relu,
    Reshape,
    ScatterDense,
    ScnError,
    SparseConv,
    Transpose,
)

#: What libspconv's parser takes for an attribute that is missing.
_OUTPUT_BOUND = 150_000
_ACTIVATIONS = {'ReLU': True, 'None': False, '': False}


def read_program(path: str | Path) -> Program:
    """Reads a file for libspconv.

    Args:
        path: The file.

    Returns:
        The program, checked.

    Raises:
        ScnError: If the file is missing, truncated, holds something else or has what neither
            libspconv nor this package computes; names the file and the node.
    """
    path = Path(path)
    if not path.is_file():
        raise ScnError(f'{path} does not exist')
    try:
        model = onnx.load(str(path))
    except (DecodeError, ValueError) as err:
        raise ScnError(f'{path} is truncated, or no ONNX file: {err}') from err
    try:
        return from_onnx(model)
    except ScnError as err:
        raise ScnError(f'{path}: {err}') from None


def from_onnx(model: onnx.ModelProto) -> Program:
    """Converts a model in memory to a program.

    Raises:
        ScnError: As :func:`read_program`, without the name of the file.
    """
    graph = model.graph
    kinds = sorted({node.op_type for node in graph.node})
    if 'SparseConvolution' not in kinds:
        has = f'its operators are {", ".join(kinds)}' if kinds else 'it is empty or truncated'
        raise ScnError(f'there is no SparseConvolution, so this is no file for libspconv: {has}')
    odd = [kind for kind in kinds if kind not in _READERS]
    if odd:
        raise ScnError(f'libspconv does not have {", ".join(odd)}; it has {", ".join(_READERS)}')
    if len(graph.input) != 1 or len(graph.output) != 1:
        raise ScnError(
            f'expected one input and one output, found {len(graph.input)} and '
            f'{len(graph.output)}: the file is truncated or of another kind'
        )
    weights = {i.name: i for i in graph.initializer}
    ops = []
    for node in graph.node:
        try:
            ops.append(_READERS[node.op_type](_Node(node, weights)))
        except ScnError as err:
            raise ScnError(f'{node.op_type} {node.name}: {err}') from None
    shapes = [_shape(value) for value in (graph.input[0], graph.output[0])]
    program = Program(
        ops=tuple(ops),
        channels=shapes[0][-1],
        output=graph.output[0].name,
        output_shape=shapes[1],
        input=graph.input[0].name,
    )
    check(program)
    return program


def _shape(value: onnx.ValueInfoProto) -> Axes:
    kind = value.type.tensor_type
    if kind.elem_type != TensorProto.FLOAT16 or not kind.shape.dim:
        raise ScnError(f'{value.name!r} is not a float16 tensor with a shape')
    return tuple(dim.dim_value for dim in kind.shape.dim)


class _Node:
    """Attributes and weights of a node, read with a check of their types."""

    def __init__(self, node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]):
        self.node = node
        self.weights = weights
        self.attributes = {a.name: a for a in node.attribute}

    def get(self, name: str, kind: str, default: Any = ScnError) -> Any:
        """Reads an attribute; ``kind`` is INT, INTS, FLOAT, FLOATS or STRING.

        Raises:
            ScnError: If it has another type, or is missing and has no default.
        """
        attribute = self.attributes.get(name)
        if attribute is None:
            if default is ScnError:
                raise ScnError(f'attribute {name} is missing')
            return default
        if attribute.type != getattr(onnx.AttributeProto, kind):
            has = onnx.AttributeProto.AttributeType.Name(attribute.type)
            raise ScnError(f'attribute {name} is {has}, expected {kind}')
        value = helper.get_attribute_value(attribute)
        if kind == 'STRING':
            return value.decode()
        return tuple(value) if kind.endswith('S') else value

    def axes(self, name: str) -> Axes:
        """Reads an attribute with three integers."""
        values = self.get(name, 'INTS')
        if len(values) != 3:
            raise ScnError(f'attribute {name} has {len(values)} values, expected 3')
        return values

    def inputs(self, count: int) -> tuple:
        """Returns the names of the tensors read, checked for their number."""
        if len(self.node.input) != count:
            raise ScnError(f'{len(self.node.input)} inputs, expected {count}')
        return tuple(self.node.input)

    def common(self, count: int) -> dict[str, Any]:
        """Reads the fields that all operators have."""
        tensors = self.inputs(count)
        return dict(name=self.node.name, inputs=tensors, output=self.node.output[0])

    def precisions(self) -> dict[str, Any]:
        """Reads the precisions; as in the parser, everything that is not 'int8' is FP16."""
        names = ('precision', 'output_precision')
        return {n: 'int8' if self.get(n, 'STRING', '') == 'int8' else 'fp16' for n in names}

    def half(self, name: str) -> Tensor:
        """Reads an initializer, which must be raw FP16."""
        initializer = self.weights.get(name)
        if initializer is None:
            raise ScnError(f'initializer {name!r} is missing: the file is truncated?')
        if initializer.data_type != TensorProto.FLOAT16:
            has = TensorProto.DataType.Name(initializer.data_type)
            raise ScnError(f'initializer {name!r} is {has}, libspconv reads FLOAT16')
        shape = tuple(initializer.dims)
        if len(initializer.raw_data) != 2 * math.prod(shape):
            raise ScnError(
                f'initializer {name!r} has {len(initializer.raw_data)} bytes for a shape of {shape}'
            )
        values = np.frombuffer(initializer.raw_data, '<f2').reshape(shape)
        return torch.from_numpy(values.astype(np.float16))


def _conv(node: _Node) -> Op:
    for name in ('transposed', 'inverse'):
        if node.get(name, 'INT', 0):
            raise ScnError(f'{name} convolutions are not supported')
    if node.get('groups', 'INT', 1) != 1:
        raise ScnError('convolutions with groups are not supported')
    activation = node.get('activation', 'STRING', '')
    if activation not in _ACTIVATIONS:
        raise ScnError(f'activation {activation} is not supported, only ReLU and None')
    x, weight, bias = node.inputs(3)
    op = SparseConv(
        name=node.node.name,
        inputs=(x,),
        output=node.node.output[0],
        weight=node.half(weight),
        bias=node.half(bias),
        subm=bool(node.get('subm', 'INT', 0)),
        stride=node.axes('stride'),
        padding=node.axes('padding'),
        dilation=node.axes('dilation'),
        grid=node.axes('input_spatial_shape'),
        output_grid=node.axes('output_spatial_shape'),
        relu=_ACTIVATIONS[activation],
        rulebook=node.get('rulebook', 'STRING', ''),
        input_range=node.get('input_dynamic_range', 'FLOAT', None),
        weight_ranges=node.get('weight_dynamic_ranges', 'FLOATS', None),
        output_bound=node.get('output_bound', 'INT', _OUTPUT_BOUND),
        layer=node.node.doc_string,
        **node.precisions(),
    )
    if node.axes('kernel_size') != op.kernel:
        raise ScnError(
            f'kernel_size {node.axes("kernel_size")}, but a weight of shape '
            f'{tuple(op.weight.shape)}'
        )
    return op


def _add(node: _Node) -> Op:
    ranges = (
        node.get('input0_dynamic_range', 'FLOAT', None),
        node.get('input1_dynamic_range', 'FLOAT', None),
    )
    return Add(**node.common(2), ranges=ranges, layer=node.node.doc_string, **node.precisions())


def _scatter(node: _Node) -> Op:
    return ScatterDense(
        **node.common(1),
        order=node.get('format', 'STRING'),
        grid=node.axes('input_spatial_shape'),
        shape=node.get('output_shape', 'INTS'),
    )


_READERS: dict[str, Callable[[_Node], Op]] = {
    'SparseConvolution': _conv,
    'Add': _add,
    'QuantAdd': _add,
    'Relu': lambda node: Relu(**node.common(1)),
    'ScatterDense': _scatter,
    'Transpose': lambda node: Transpose(**node.common(1), dims=node.get('dims', 'INTS')),
    'Reshape': lambda node: Reshape(**node.common(1), dims=node.get('dims', 'INTS')),
}
