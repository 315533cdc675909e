"""Joining of nodes with the graph that reads what they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import NodeProto, TensorProto, helper

from mmdet3d_quant.export.pairs import ExportError
from mmdet3d_quant.export.runtimes import Port, Runtime


def join(
    nodes: Sequence[NodeProto],
    stored: Sequence[TensorProto],
    graph: onnx.ModelProto,
    fed: Mapping[str, str],
    runtime: Runtime,
) -> onnx.ModelProto:
    """Puts nodes in front of a graph.

    Args:
        nodes: In the order of execution.
        stored: Their stored tensors.
        graph: The graph behind them; left unchanged.
        fed: Name of the tensor that the nodes make by name of the graph's input, of equal types.
        runtime: Whose operators the nodes may be.

    Returns:
        A new model. Inputs that are fed are none any more; those of the nodes are for
        :func:`with_ports` to declare.

    Raises:
        ExportError: If the graph has a tensor with the name of one that the nodes make.
    """
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    mine = {o for n in nodes for o in n.output} | {t.name for t in stored}
    theirs = {o for n in graph.graph.node for o in n.output}
    clash = sorted(mine & (theirs | {t.name for t in graph.graph.initializer}))
    if clash:
        raise ExportError(f'the graph has a tensor {clash[0]} already: rename the layer')
    for node in result.graph.node:
        node.input[:] = [fed.get(name, name) for name in node.input]
    behind = list(result.graph.node)
    del result.graph.node[:]
    result.graph.node.extend([*nodes, *behind])
    result.graph.initializer.extend(stored)
    kept = [value for value in result.graph.input if value.name not in fed]
    typed = [value for value in result.graph.input if value.name in fed]
    del result.graph.input[:]
    result.graph.input.extend(kept)
    for value in typed:  # whose shape engines cannot tell from a plugin
        value.name = fed[value.name]
        result.graph.value_info.append(value)
    if any(node.domain == runtime.domain for node in nodes):
        result.opset_import.append(helper.make_operatorsetid(runtime.domain, runtime.version))
    return result


def with_ports(
    model: onnx.ModelProto,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    sizes: Mapping[str, int],
) -> None:
    """Declares the inputs and outputs of a model as its runtime has them, in place.

    A tensor of another type is cast, as in a graph that is typed FP16 throughout.

    Args:
        model: The model, with tensors of these names.
        inputs: In order.
        outputs: In order.
        sizes: Numbers for the names of sizes that the model decides.
    """
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    before: list[NodeProto] = []
    for field, ports in ((graph.input, inputs), (graph.output, outputs)):
        del field[:]
        for port in ports:
            kind = type_of(port)
            shape = [sizes.get(str(size), size) for size in port.shape]
            field.append(helper.make_tensor_value_info(port.name, kind, shape))
            other = types.get(port.name, kind)
            if other != kind:
                inner = f'{port.name}/typed'
                _rename(graph, port.name, inner)
                ends = (port.name, inner) if field is graph.input else (inner, port.name)
                to = other if field is graph.input else kind
                cast = helper.make_node('Cast', [ends[0]], [ends[1]], f'{inner}_cast', to=to)
                (before if field is graph.input else graph.node).append(cast)
    behind = list(graph.node)
    del graph.node[:]
    graph.node.extend([*before, *behind])


def type_of(port: Port) -> int:
    """Looks up the type of a port in ``onnx.TensorProto``."""
    return TensorProto.DataType.Value(dict(float32='FLOAT').get(port.dtype, port.dtype.upper()))


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
