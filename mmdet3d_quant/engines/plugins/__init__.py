"""Plugin nodes of LiDAR files on a CPU: table of the operators, and the nodes of a graph.

A runtime's own operators have kernels on its GPU alone. Here each is a function of arrays, written
from its contract, and ``split.py`` runs it between sessions of ONNX Runtime, so that the whole file
is executed as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import NodeProto

from mmdet3d_quant.engines.files import EngineError
from mmdet3d_quant.engines.plugins import autoware, openvino
from mmdet3d_quant.engines.plugins.attributes import named
from mmdet3d_quant.engines.plugins.operators import Operator

#: Operators by domain and name.
DOMAINS = {room.DOMAIN: room.KINDS for room in (autoware, openvino)}


def plugin_nodes(model: onnx.ModelProto) -> dict[int, Operator]:
    """Reads the plugin nodes of a graph.

    Args:
        model: Any model.

    Returns:
        Dict of operators by the number of the node.

    Raises:
        EngineError: If a node is not as its contract says; names it.
    """
    return {n: _operator(node) for n, node in enumerate(model.graph.node) if node.domain in DOMAINS}


def without_kernels(kinds: Iterable[str]) -> list[str]:
    """Lists the operators, of ``domain::name``, that have no function of arrays here."""
    return [kind for kind in kinds if kind.partition('::')[0] not in DOMAINS]


def _operator(node: NodeProto) -> Operator:
    kinds = DOMAINS[node.domain]
    if node.op_type not in kinds:
        raise EngineError(f'{named(node)} is no operator that runs here; {", ".join(kinds)} are')
    return Operator(kinds[node.op_type], node)
