"""What FP16 can hold: scales, weights, and the sums of a layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mmdet3d_quant.export.graph import axis_of, decoded, stored_tensors
from mmdet3d_quant.export.pairs import ExportError
from mmdet3d_quant.files.typed import round_tensors, tensor_types

#: FP16's largest number and its least normal one.
LARGEST, LEAST = 65504.0, 2.0**-14
#: Layers with a weight, and the axis of it that indexes output channels.
LAYERS = {'Conv': 0, 'ConvTranspose': 1, 'Gemm': 0, 'MatMul': -1}
#: Ops that may read a number beyond FP16 as a limit or a filling; Add only a negative one, a mask.
_LIMITS = frozenset({'Clip', 'Equal', 'Greater', 'Less', 'Max', 'Min', 'Pad', 'Where'})
_PAIR = ('QuantizeLinear', 'DequantizeLinear')


def round_scales(graph: onnx.GraphProto, names: Mapping[str, str], below: float = math.inf) -> None:
    """Rounds the scales of a graph to numbers that FP16 has, in place; their type stays.

    Weights that are stored as integers before keep these: rounding moves their scale by one part
    in 4096 at most where it is :data:`LEAST` or more. Below, the integers must follow.

    Args:
        graph: A graph with constant scales, float32.
        names: Name of the quantizer by output of the QuantizeLinear.
        below: Leave scales that are this or more.

    Raises:
        ExportError: If one becomes zero or infinite; names the quantizer and counts channels.
    """
    stored, rounded = stored_tensors(graph), {}
    for node in graph.node:
        if node.op_type not in _PAIR or node.input[1] in rounded:
            continue
        scale = numpy_helper.to_array(stored[node.input[1]])
        with np.errstate(over='ignore'):
            half = scale.astype(np.float16)
        for wrong, what in ((half == 0, 0), (np.isinf(half), 'infinite')):
            if wrong.any():
                label = names.get(node.output[0]) or names.get(node.input[0]) or node.name
                raise ExportError(
                    f'{label}: {wrong.sum()} of {scale.size} scale(s) are {what} in FP16, such as '
                    f'{scale[wrong].flat[0]:.3g}: calibrate on data that reach it, or export with '
                    '--target tensorrt8, whose scales are float32'
                )
        rounded[node.input[1]] = np.where(scale < below, half.astype(np.float32), scale)
    for name, value in rounded.items():
        stored[name].CopyFrom(numpy_helper.from_array(value, stored[name].name))


def weight_of(
    tensor: str, makers: Mapping[str, NodeProto], stored: Mapping[str, TensorProto]
) -> np.ndarray | None:
    """Computes a stored tensor, behind Q/DQ, too; None if it is not stored.

    Returns:
        Float64 array, or of integers.
    """
    if tensor in stored:
        value = decoded(stored[tensor])
        return value.astype(np.float64) if value.dtype.kind == 'f' else value
    node = makers.get(tensor)
    if node is None or node.op_type not in _PAIR:
        return None
    steps, scale = (weight_of(i, makers, stored) for i in node.input[:2])
    real = node.input[0] not in stored or stored[node.input[0]].data_type == TensorProto.FLOAT
    if steps is None or scale is None or real:
        return steps
    if scale.ndim:
        scale = scale.reshape([-1 if i == axis_of(node) else 1 for i in range(steps.ndim)])
    return steps * scale


def beyond(graph: onnx.GraphProto) -> Iterator[tuple[NodeProto, str]]:
    """Finds stored numbers that FP16 cannot hold.

    Yields:
        A node that reads some, and which they are.
    """
    stored = stored_tensors(graph)
    makers = {o: n for n in graph.node for o in n.output}
    for node in graph.node:
        if node.op_type in (*_LIMITS, *_PAIR, 'Constant'):
            continue
        for i, name in enumerate(node.input):
            value = weight_of(name, makers, stored)
            if value is None or value.dtype.kind != 'f':
                continue
            size = np.where(np.isfinite(value), value, 0)
            size = size if node.op_type == 'Add' else np.abs(size)
            if (size > LARGEST).any():
                axis = LAYERS.get(node.op_type, 0) if i == 1 and value.ndim > 1 else 0
                where = np.argwhere(size > LARGEST)[0]
                channel = f'channel {where[axis]} of ' if len(where) else ''
                yield node, f'{channel}{name} reaches {size.max():.4g}'


def round_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rounds the tensors and weights of a graph to FP16, as an engine may that chooses types.

    Args:
        model: A graph typed float32, without subgraphs; left unchanged.

    Returns:
        A new model, typed float32. Q/DQ pairs and their scales stay, so do stored numbers of a node
        with one beyond FP16, for which there is :func:`beyond`.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    wide = {node.output[0] for node, _ in beyond(model.graph)}
    read = {i for n in model.graph.node if n.op_type not in (*_PAIR, *_LIMITS) for i in n.input}
    kept = {i for n in model.graph.node if n.output[0] in wide for i in n.input}
    for tensor in result.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name in read - kept:
            value = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    floats = (n for n, t in tensor_types(model).items() if t.elem_type == TensorProto.FLOAT)
    return round_tensors(result, list(floats))


def require_weights(graph: onnx.GraphProto, layers_only: bool = False) -> None:
    """Checks that FP16 can hold the weights of a graph.

    Args:
        graph: The graph.
        layers_only: Look at convolutions and products only.

    Raises:
        ExportError: If it cannot; names layer and channel.
    """
    for node, what in beyond(graph):
        if node.op_type in LAYERS or not layers_only:
            raise ExportError(
                f'{node.name or node.op_type}: {what}, beyond the {LARGEST:.0f} of FP16: export '
                'in float32 (--target tensorrt8 without --fp16), or train with weight decay'
            )


def sum_bound(
    node: NodeProto,
    sizes: Mapping[str, float],
    shapes: Mapping[str, list[int]],
    weight: np.ndarray | None,
    shares: Collection[str] = (),
) -> tuple[float, str]:
    """Computes the most that partial sums inside a node can reach, if all terms have one sign.

    Args:
        node: Of a graph with known sizes of tensors.
        sizes: Largest magnitudes by tensor.
        shapes: Shapes by tensor; a size that varies is 1.
        weight: Second operand of a convolution or product, if it is stored.
        shares: Tensors that sum up to one along their last axis, as of a softmax.

    Returns:
        The bound, 0 if the node sums nothing, and how it was computed.
    """
    kind, first = node.op_type, node.input[0] if node.input else ''
    size, shape = sizes.get(first, 0.0), shapes.get(first, [])
    count = math.prod(shape)
    outputs = math.prod(shapes.get(node.output[0], [])) or 1
    terms = dict.fromkeys(('ReduceSum', 'ReduceMean', 'ReduceL1'), (count // outputs, 1))
    terms.update(dict.fromkeys(('ReduceL2', 'ReduceSumSquare'), (count // outputs, 2)))
    terms['GlobalAveragePool'] = terms['ReduceMean']
    axis = next((a.i for a in node.attribute if a.name == 'axis'), -1)
    if kind in ('Softmax', 'LogSoftmax', 'CumSum') and shape:
        terms[kind], size = (shape[axis], 1), 1.0 if kind != 'CumSum' else size
    if kind == 'LayerNormalization' and shape:
        terms[kind] = math.prod(shape[axis:]), 2
    if kind in ('InstanceNormalization', 'GroupNormalization'):
        terms[kind] = math.prod(shape[1 if kind.startswith('G') else 2 :]), 2
    if kind == 'AveragePool':
        kernel = helper.get_attribute_value(
            next(a for a in node.attribute if a.name == 'kernel_shape')
        )
        terms[kind] = math.prod(kernel), 1
    if kind in terms:
        number, power = terms[kind]
        return number * size**power, f'{number} terms of up to {size**power:.3g}'
    if kind not in LAYERS:
        return 0.0, ''
    if weight is None and first in shares:
        return sizes.get(node.input[1], 0.0), 'a mean'
    if weight is None:
        inner, other = (shape or [1])[-1], sizes.get(node.input[1], 0.0)
        return inner * size * other, f'{inner} terms of up to {size * other:.3g}'
    turned = kind == 'Gemm' and not any(a.name == 'transB' and a.i for a in node.attribute)
    axes = {i for i in range(weight.ndim)} - {(1 if turned else LAYERS[kind]) % weight.ndim}
    if kind == 'MatMul':
        axes = {weight.ndim - 2} if weight.ndim > 1 else {0}
    most = float(np.abs(weight).sum(axis=tuple(axes)).max())
    return most * size, f'weights of {most:.3g} in sum times {size:.3g}'
