"""Plugin nodes of LiDAR files on a CPU: table of the operators, and graphs that call them.

A runtime's own operators have kernels on its GPU alone. Here each is a function of arrays, from
its contract, so that ONNX Runtime executes the whole file as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import NodeProto

from mmdet3d_quant.engines.files import EngineError
from mmdet3d_quant.engines.plugins import autoware, openvino
from mmdet3d_quant.engines.plugins.attributes import named, read_attributes
from mmdet3d_quant.engines.plugins.calls import Calls, called, import_calls, library

#: Operators by domain and name.
DOMAINS = {room.DOMAIN: room.KINDS for room in (autoware, openvino)}


def runs_here(kinds: Iterable[str]) -> bool:
    """Tells whether all of some operators, ``domain::name``, can be run by ONNX Runtime here."""
    known = {f'{domain}::{name}' for domain, kinds in DOMAINS.items() for name in kinds}
    return {*kinds} <= known


def is_plugin(node: NodeProto) -> bool:
    """Tells whether a node belongs to a domain of plugins that are known here."""
    return node.domain in DOMAINS


def with_calls(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Calls]:
    """Replaces the plugin nodes of a graph by calls of Python.

    Args:
        model: Any model; not changed.

    Returns:
        The model, the same object if it has none, and what it calls: to be kept as long as it runs.

    Raises:
        EngineError: If onnxruntime-extensions is missing, or a node is not as its contract says.
    """
    calls = Calls()
    if not any(map(is_plugin, model.graph.node)):
        return model, calls
    library()
    result = onnx.ModelProto()
    result.CopyFrom(model)
    import_calls(result)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes += _call(node, calls) if is_plugin(node) else [node]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result, calls


def _call(node: NodeProto, calls: Calls) -> list[NodeProto]:
    kinds = DOMAINS[node.domain]
    if node.op_type not in kinds:
        raise EngineError(f'{named(node)} is no operator that runs here; {", ".join(kinds)} are')
    kind = kinds[node.op_type]
    given = list(node.input)
    while given and not given[-1]:
        given.pop()
    least = len(kind.inputs) if kind.least is None else kind.least
    if not least <= len(given) <= len(kind.inputs) or '' in given:
        raise EngineError(
            f'{named(node)} has {len(given)} inputs, wanted are {least} to {len(kind.inputs)}'
        )
    if len(node.output) > len(kind.outputs):
        raise EngineError(f'{named(node)} has {len(node.output)} outputs')
    attributes = read_attributes(node, kind.fields)
    if kind.check:
        try:
            kind.check(attributes, len(given))
        except EngineError as err:
            raise EngineError(f'{named(node)}: {err}') from None
    call = calls.add(kind, attributes, named(node), len(given))
    shorter = NodeProto()
    shorter.CopyFrom(node)
    shorter.input[:] = given
    return called(shorter, call, kind)
