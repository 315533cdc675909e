"""Comparison points of a model and its file: the inputs of activation quantizers, and outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from mmdet3d_quant.check.runs import run_torch
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.engines import Arrays
from mmdet3d_quant.export.cuts import Cut
from mmdet3d_quant.export.graph import stored_tensors
from mmdet3d_quant.export.pairs import stored_names


def torch_points(cut: Cut, mode: str, fed: Arrays | None = None, outputs: bool = False) -> Arrays:
    """Records the input of every active activation quantizer, in the order of execution.

    Args:
        cut: The part, with its inputs.
        mode: Mode of the quantizers.
        fed: Arrays by point that replace the inputs after they are recorded.
        outputs: Whether to add the outputs of the graph.

    Returns:
        Dict of arrays by point. A point is the name of the quantizer; its second call is
        ``name#2``.
    """
    seen: Arrays = {}

    def watch(name: str) -> Callable:
        def hook(quantizer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            point = _numbered(name, seen)
            seen[point] = args[0].detach().cpu().numpy().copy()
            return (torch.from_numpy(fed[point]).to(args[0]),) if fed and point in fed else None

        return hook

    hooks = [
        quantizer.register_forward_pre_hook(watch(name))
        for name, quantizer in quantizers(cut.module).items()
        if quantizer.float_reason is None and not name.endswith('_weight_quantizer')
    ]
    try:
        results = run_torch(cut, mode)
    finally:
        for hook in hooks:
            hook.remove()
    if outputs:
        seen.update({output_point(name): value for name, value in results.items()})
    return seen


def _numbered(name: str, taken: Iterable[str]) -> str:
    """Returns ``name``, or the first of ``name#2``, ``name#3``, ... that is not taken."""
    point, count = name, 1
    while point in taken:
        count += 1
        point = f'{name}#{count}'
    return point


def output_point(name: str) -> str:
    """Point of an output of the graph."""
    return f'output {name}'


def points_of(model: onnx.ModelProto, known: Iterable[str]) -> dict[str, str]:
    """Maps each activation QuantizeLinear of a file to the point of its quantizer in the model.

    The metadata of the file has the names of quantizers. In a file without them, node names spell
    the path of the module: ``/neck/blocks/blocks.0/_input_quantizer/Quantize...`` is
    ``neck.blocks.0._input_quantizer``, possibly without the names of modules whose ``forward`` was
    not called.

    Args:
        model: The file.
        known: Points of the torch model.

    Returns:
        Dict of points by name of the node's output, without nodes of weights and nodes without a
        counterpart.
    """
    known = list(known)
    named = stored_names(model)
    points: dict[str, str] = {}
    for node in _rounding(model.graph):
        if named is None:
            name = _guessed(node.name, known)
        else:
            name = named.get(node.output[0])
        point = _numbered(name, points.values()) if name else None
        if point in known:
            points[node.output[0]] = point
    return points


def _rounding(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Lists the QuantizeLinear nodes of activations."""
    constants = stored_tensors(graph)
    return [n for n in graph.node if n.op_type == 'QuantizeLinear' and n.input[0] not in constants]


def _guessed(node: str, known: list[str]) -> str | None:
    """Name of the only quantizer that a node's name fits, None if there are more or none."""
    name = module_name(node)
    for called in (name, re.sub(r'_\d+$', '', name)):  # _1: the module is called again
        names = [p for p in known if '#' not in p and f'.{p}'.endswith(f'.{called}')]
        if called and names:
            return names[0] if len(names) == 1 else None
    return None


def module_name(node: str) -> str:
    """Converts the name of a node of torch's exporter to the dotted name of its module.

    >>> module_name('/layer1/layer1.0/conv1/_input_quantizer/QuantizeLinear')
    'layer1.0.conv1._input_quantizer'
    """
    parts = node.strip('/').split('/')[:-1]
    kept = [
        part
        for part, after in zip(parts, [*parts[1:], ''])
        if not re.fullmatch(re.escape(part) + r'(\.\d+)+', after)
    ]
    return '.'.join(kept)


def cut_at_points(
    model: onnx.ModelProto, fed: Arrays
) -> tuple[onnx.ModelProto, dict[str, str], dict[str, str]]:
    """Cuts a graph at its activation quantizers: each reads a new input of the graph.

    Args:
        model: The file; not changed.
        fed: Arrays by point; their shapes and signs decide the new inputs.

    Returns:
        Tuple of the cut graph, which also outputs the tensors that the quantizers read before; a
        dict of points by name of the new input; a dict of the names of those outputs, and of the
        graph's own, by point.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    points = points_of(model, fed)
    taken = {i.name for i in graph.input}
    outputs = {o.name for o in graph.output}
    stored = stored_tensors(graph)
    rectified: list[onnx.NodeProto] = []
    replaced, arriving = {}, {output_point(o.name): o.name for o in graph.output}
    for node in graph.node:
        point = points.get(node.output[0]) if node.op_type == 'QuantizeLinear' else None
        if point is None or node.input[0] in taken:
            continue
        tensor, name = node.input[0], f'fed {point}'
        node.input[0] = name
        replaced[name], arriving[point] = point, tensor
        kind = stored[node.input[1]].data_type if node.input[1] in stored else TensorProto.FLOAT
        graph.input.append(helper.make_tensor_value_info(name, kind, fed[point].shape))
        if fed[point].min() >= 0:  # tells engines, which take other kernels for such tensors
            node.input[0] = f'{name} rectified'
            rectified.append(helper.make_node('Relu', [name], [node.input[0]]))
        if tensor not in outputs:
            outputs.add(tensor)
            graph.output.append(helper.make_tensor_value_info(tensor, kind, fed[point].shape))
    nodes = [*rectified, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return result, replaced, arriving


def makers_of(model: onnx.ModelProto, fed: Arrays) -> tuple[dict[str, list[str]], set[str]]:
    """Lists the layers between each point and the points before it.

    Args:
        model: The file.
        fed: Arrays by point.

    Returns:
        Tuple of a dict of lists of names by point, in the order of the graph: names of
        convolutions and linear layers, or of all nodes where there are none of those; and the
        points before which a QuantizeLinear is left whose input is not replaced.
    """
    cutting, replaced, arriving = cut_at_points(model, fed)
    known = points_of(model, fed)
    strange = {n.output[0] for n in _rounding(model.graph) if n.output[0] not in known}
    across: set[str] = set()
    nodes = list(cutting.graph.node)
    number = {o: i for i, n in enumerate(nodes) for o in n.output}
    makers = {}
    for point, tensor in arriving.items():
        piece, todo = set(), [tensor]
        while todo:
            i = number.get(todo.pop())
            if i is not None and i not in piece:
                piece.add(i)
                todo.extend(nodes[i].input)
        inside = [nodes[i] for i in sorted(piece) if nodes[i].op_type != 'Constant']
        if any(n.output[0] in strange for n in inside):
            across.add(point)
        layers = [n for n in inside if n.op_type in ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')]
        names = dict.fromkeys(module_name(n.name) or n.name for n in layers or inside if n.name)
        makers[max(piece, default=-1), point] = list(names)
    return {point: makers[i, point] for i, point in sorted(makers)}, across
