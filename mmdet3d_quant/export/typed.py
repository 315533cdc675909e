"""Strongly typed graphs: FP16 outside of Q/DQ, but for what FP16 cannot hold.

What FP16 cannot hold is found in ``export/pinned.py``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mmdet3d_quant.export.graph import names_read, opset, stored_tensors
from mmdet3d_quant.export.half import LARGEST, require_weights
from mmdet3d_quant.export.pairs import ExportError
from mmdet3d_quant.export.passes import drop_unused
from mmdet3d_quant.export.pinned import float32_nodes, takes_half
from mmdet3d_quant.files.metadata import STRONG, TYPING_KEY
from mmdet3d_quant.files.typed import tensor_types

#: Key of the file's metadata, where the nodes that stay float32 are listed with their reasons.
FLOAT32_KEY = 'mmdet3d_quant.float32'
FLOAT, HALF = int(TensorProto.FLOAT), int(TensorProto.FLOAT16)
_NAMES = {FLOAT: 'float32', HALF: 'float16'}
_DTYPES: dict[int, Any] = {FLOAT: np.float32, HALF: np.float16}


def to_strong(model: onnx.ModelProto, peaks: Mapping[str, float]) -> onnx.ModelProto:
    """Types a graph, inputs and outputs included; results stay but for rounding to FP16.

    Args:
        model: A graph typed float32, with scales that FP16 has and, if quantized, of opset 19.
        peaks: Largest magnitude by tensor, of ``export.ranges``.

    Returns:
        A new model. Its metadata say that it is strongly typed, and which nodes stay float32.

    Raises:
        ExportError: If FP16 cannot hold a weight, an input or an output, or the graph has branches
            or loops.
    """
    for node in model.graph.node:
        if names_read(node) != set(node.input):
            raise ExportError(
                f'{node.name or node.op_type} is a branch or a loop, which cannot be typed: export '
                'with --target tensorrt8'
            )
    require_weights(model.graph, layers_only=True)
    for value in (*model.graph.input, *model.graph.output):
        if not peaks.get(value.name, 0.0) <= LARGEST:
            raise ExportError(
                f'{value.name} reaches {peaks[value.name]:.3g}, beyond the {LARGEST:.0f} of FP16, '
                'which inputs and outputs have: scale it, or export with --target tensorrt8'
            )
    reasons = float32_nodes(model, peaks)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.value_info[:]
    _Writer(model, reasons).write(result.graph)
    drop_unused(result.graph)
    told = {
        node.name or node.output[0]: reasons[i]
        for i, node in enumerate(model.graph.node)
        if i in reasons
    }
    props = {p.key: p.value for p in model.metadata_props}
    props.update({TYPING_KEY: STRONG, FLOAT32_KEY: json.dumps(told)})
    helper.set_model_props(result, props)
    return result


def kept_float32(model: onnx.ModelProto) -> dict[str, str]:
    """Reads the reasons by name of the nodes that stay float32 in a strongly typed file."""
    props = {p.key: p.value for p in model.metadata_props}
    return json.loads(props.get(FLOAT32_KEY, '{}'))


class _Writer:
    """Writes the nodes of a graph anew, with types and the casts between.

    Args:
        model: The graph, typed float32.
        reasons: Numbers of the nodes that stay float32.
    """

    def __init__(self, model: onnx.ModelProto, reasons: Mapping[int, str]) -> None:
        self.old, self.reasons, self.version = model.graph, reasons, opset(model)
        self.stored = stored_tensors(model.graph)
        self.floats = {n for n, t in tensor_types(model).items() if t.elem_type == FLOAT}
        self.floats |= {n for n, t in self.stored.items() if t.data_type == FLOAT}
        self.nodes: list[NodeProto] = []
        self.made: dict[str, TensorProto] = {}
        #: Names of tensors by old name and type.
        self.names: dict[str, dict[int, str]] = defaultdict(dict)

    def write(self, graph: onnx.GraphProto) -> None:
        """Replaces the nodes, stored tensors, inputs and outputs of a graph."""
        for value in graph.input:
            if value.name in self.floats:
                value.type.tensor_type.elem_type = HALF
                self.names[value.name] = {HALF: value.name}
        wanted = self._wanted()
        for number, node in enumerate(self.old.node):
            if node.op_type == 'Constant' and node.output[0] in self.floats:
                continue  # becomes an initializer of each type that is read
            if node.op_type in ('QuantizeLinear', 'DequantizeLinear'):
                self._write_pair(node, wanted)
            else:
                self._write(node, FLOAT if number in self.reasons else HALF)
        for value in graph.output:
            if value.name in self.floats:
                value.type.tensor_type.elem_type = HALF
                self._name_output(value.name)
        kept = [i for i in self.old.initializer if i.data_type != FLOAT]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend([*kept, *self.made.values()])

    def _kind(self, node: NodeProto, index: int, kind: int) -> int:
        """Type of an input of a node that computes in ``kind``."""
        return kind if takes_half(node, self.version, index) else FLOAT

    def _wanted(self) -> dict[str, set[int]]:
        """Types in which each tensor is read by other than Q and DQ nodes."""
        wanted: dict[str, set[int]] = defaultdict(set)
        for number, node in enumerate(self.old.node):
            if node.op_type not in ('QuantizeLinear', 'DequantizeLinear'):
                for i, name in enumerate(node.input):
                    kind = FLOAT if number in self.reasons else HALF
                    wanted[name].add(self._kind(node, i, kind))
        return wanted

    def _write(self, node: NodeProto, kind: int) -> None:
        new = NodeProto()
        new.CopyFrom(node)
        for i, name in enumerate(node.input):
            if name in self.floats:
                new.input[i] = self._typed(name, self._kind(node, i, kind))
        for name in node.output:
            if name in self.floats:
                self.names[name] = {kind: name}
        for attribute in new.attribute if kind == HALF else ():
            if attribute.name in ('to', 'dtype') and attribute.i == FLOAT:
                attribute.i = HALF
            if attribute.name == 'value' and attribute.t.data_type == FLOAT:
                attribute.t.CopyFrom(_convert(attribute.t, HALF))
        if node.op_type == 'ConstantOfShape' and not node.attribute and kind == HALF:
            zero = helper.make_tensor('value', HALF, [1], [0])
            new.attribute.append(helper.make_attribute('value', zero))
        self.nodes.append(new)

    def _write_pair(self, node: NodeProto, wanted: Mapping[str, set[int]]) -> None:
        """Writes a Q in the type that its input has, a DQ in each type that is read."""
        source, kinds = node.input[0], {FLOAT}  # of stored weights
        if node.op_type == 'DequantizeLinear':
            kinds = wanted.get(node.output[0]) or {HALF}
        elif source not in self.stored:
            kinds = {min(self.names[source], key=lambda kind: kind != HALF)}
        for kind in sorted(kinds, reverse=True):  # FP16 first: it keeps the name
            new = NodeProto()
            new.CopyFrom(node)
            if source in self.floats:
                new.input[0] = self._typed(source, kind)
            new.input[1] = self._typed(node.input[1], kind)
            if node.output[0] in self.floats:
                if self.names[node.output[0]]:
                    new.name, new.output[0] = (
                        f'{n}_{_NAMES[kind]}' for n in (new.name, new.output[0])
                    )
                self.names[node.output[0]][kind] = new.output[0]
            self.nodes.append(new)

    def _typed(self, name: str, kind: int) -> str:
        """Returns the name of a tensor in a type; makes a cast or a stored tensor for it."""
        there = self.names[name]
        if kind not in there and name in self.stored:
            tensor = _convert(self.stored[name], kind)
            tensor.name = name if kind == FLOAT else f'{name}_{_NAMES[kind]}'
            self.made[tensor.name], there[kind] = tensor, tensor.name
        elif kind not in there:
            (source,) = there.values()
            there[kind] = f'{name}_{_NAMES[kind]}'
            cast = helper.make_node('Cast', [source], [there[kind]], f'{there[kind]}_cast', to=kind)
            self.nodes.append(cast)
        return there[kind]

    def _name_output(self, name: str) -> None:
        """Gives an output of the graph, FP16, the name that it had."""
        now = self._typed(name, HALF)
        if now == name:
            return
        other = f'{name}_{_NAMES[FLOAT]}'
        renamed = {name: other, now: name}
        for node in self.nodes:
            node.input[:] = [renamed.get(i, i) for i in node.input]
            node.output[:] = [renamed.get(o, o) for o in node.output]


def _convert(tensor: TensorProto, kind: int) -> TensorProto:
    """Converts a stored tensor to another type."""
    value = numpy_helper.to_array(tensor)
    with np.errstate(over='ignore'):  # a limit becomes infinite
        return numpy_helper.from_array(value.astype(_DTYPES[kind]), tensor.name)
