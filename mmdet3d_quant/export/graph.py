"""Facts of an ONNX graph that passes and judges read alike: stored tensors, axis, opset, NaN."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

#: Both spellings of the domain of ONNX's own operators.
ONNX_DOMAINS = ('', 'ai.onnx')
#: Attributes that hold graphs.
_BODIES = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def opset(model: onnx.ModelProto) -> int:
    """Reads the version of ONNX's own operators that a model imports.

    Raises:
        ValueError: If it imports none.
    """
    for imported in model.opset_import:
        if imported.domain in ONNX_DOMAINS:
            return imported.version
    domains = ', '.join(repr(o.domain) for o in model.opset_import) or 'none'
    raise ValueError(f'the model imports no opset of ONNX itself; its domains: {domains}')


def stored_tensors(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    """Collects the initializers and the values of Constant nodes, other than sparse ones, by name.

    Tensors are left encoded, since weights are large: decode those that are wanted with
    ``numpy_helper.to_array``.
    """
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == 'Constant':
            value = _value(node)
            if value is not None:
                found[node.output[0]] = value
    return found


def _value(node: NodeProto) -> TensorProto | None:
    """The tensor of a Constant node, which may also be given as numbers or text; else None."""
    (given,) = node.attribute
    value = helper.get_attribute_value(given)
    if isinstance(value, TensorProto):
        return value
    kinds = dict(int=TensorProto.INT64, float=TensorProto.FLOAT, string=TensorProto.STRING)
    kind = kinds.get(given.name[len('value_') :].rstrip('s'))
    if kind is None:
        return None
    shape = [len(value)] if given.name.endswith('s') else []
    return helper.make_tensor(node.output[0], kind, shape, value if shape else [value])


def decoded(tensor: TensorProto) -> np.ndarray:
    """Reads a stored tensor; FP8, for which numpy has no type, as float32."""
    value = numpy_helper.to_array(tensor)
    return value.astype(np.float32) if tensor.data_type == TensorProto.FLOAT8E4M3FN else value


def custom_ops(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Finds the operators that ONNX does not have, which need a plugin in every engine.

    Returns:
        Names of the nodes by operator, ``domain::name``.
    """
    found: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.domain not in ONNX_DOMAINS:
            found.setdefault(f'{node.domain}::{node.op_type}', []).append(node.name)
    return found


def names_read(node: NodeProto) -> set[str]:
    """Collects the tensors that a node reads, those that only its branches or loops read, too.

    Tensors that are made inside of these are among them; their names are not used outside.
    """
    found = set(node.input)
    for given in node.attribute:
        for body in (given.g, *given.graphs) if given.type in _BODIES else ():
            found.update(output.name for output in body.output)
            found.update(*map(names_read, body.node))
    return found


def axis_of(node: NodeProto) -> int:
    """Reads the axis attribute of a Q or DQ; 1 is ONNX's default."""
    return next((a.i for a in node.attribute if a.name == 'axis'), 1)


#: Ops that may read an infinity: masks, limits and fillings.
_LIMITS = frozenset({
    'Add', 'Clip', 'Concat', 'ConstantOfShape', 'Equal', 'Expand', 'Greater', 'Less', 'Max', 'Min',
    'Pad', 'ScatterElements', 'ScatterND', 'Where',
})  # yapf: disable  # fmt: skip


def nonfinite_tensors(graph: onnx.GraphProto) -> Iterator[tuple[NodeProto, str, str]]:
    """Finds stored weights, biases and scales that hold NaN or infinity.

    An infinity that serves as a mask, a limit or a filling is none of them.

    Yields:
        A node that reads it, the name of the tensor, and how many of its values it is.
    """
    odd: dict[str, tuple[int, int, int]] = {}
    for name, tensor in stored_tensors(graph).items():
        value = numpy_helper.to_array(tensor)
        if value.dtype.kind == 'f' and not np.isfinite(value).all():
            odd[name] = int(np.isnan(value).sum()), int((~np.isfinite(value)).sum()), value.size
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            nans, count, size = odd.get(name, (0, 0, 0))
            if nans or (count and node.op_type not in _LIMITS):
                yield node, name, f'{count} of {size} values'
