"""Deformable convolutions of mmcv, which ONNX has under another name: files with them can run.

mmcv exports operators of its own, for which TensorRT wants a plugin. ONNX has the same since opset
19 (``DeformConv``), and ONNX Runtime runs that; OpenVINO has one, too, but no rule for either name
(``engines/openvino/deformable.py`` is one).
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import NodeProto, helper

DOMAIN = 'mmcv'
#: Inputs by name of the operator, as ONNX's calls them; what is behind the weight may be absent.
OPERATORS = {
    'MMCVDeformConv2d': ('X', 'offset', 'W'),
    'MMCVModulatedDeformConv2d': ('X', 'offset', 'mask', 'W', 'B'),
}
#: ONNX's order.
_ORDER = ('X', 'W', 'offset', 'B', 'mask')
#: The first opset with the operator.
OPSET = 19


def runs_here(kinds: Iterable[str]) -> bool:
    """Tells whether all of some operators, ``domain::name``, can be run by the engines here."""
    return {*kinds} <= {f'{DOMAIN}::{name}' for name in OPERATORS}


def is_deformable(node: NodeProto) -> bool:
    """Tells whether a node is one of mmcv's deformable convolutions."""
    return node.domain == DOMAIN and node.op_type in OPERATORS


def to_onnx_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replaces mmcv's deformable convolutions by ONNX's, which compute the same.

    Args:
        model: Any model; not changed.

    Returns:
        The model, of opset 19 or later; the same object if it has none.
    """
    if not any(map(is_deformable, model.graph.node)):
        return model
    if min((o.version for o in model.opset_import if not o.domain), default=OPSET) < OPSET:
        model = onnx.version_converter.convert_version(model, OPSET)
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model)
    nodes = [_renamed(n) if is_deformable(n) else n for n in renamed.graph.node]
    del renamed.graph.node[:]
    renamed.graph.node.extend(nodes)
    return renamed


def _renamed(node: NodeProto) -> NodeProto:
    given = dict(zip(OPERATORS[node.op_type], node.input))
    own = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    inputs = [given.get(name, '') for name in _ORDER]
    while not inputs[-1]:
        inputs.pop()
    return helper.make_node(
        'DeformConv',
        inputs,
        list(node.output),
        name=node.name,
        strides=own['stride'],
        pads=[*own['padding'], *own['padding']],
        dilations=own['dilation'],
        group=own['groups'],
        offset_group=own['deform_groups'],
    )
