"""Tensors of a graph that do not depend on its inputs, and their values."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from mmdet3d_quant.export.graph import decoded, names_read, stored_tensors

#: Ops whose result is not taken for a constant though their inputs are: rounding, and chance.
_NEVER = frozenset({
    'Bernoulli', 'DequantizeLinear', 'Multinomial', 'QuantizeLinear', 'RandomNormalLike',
    'RandomUniformLike',
})  # yapf: disable  # fmt: skip


class Constants:
    """Stored tensors, and those that are computed from stored ones only.

    Args:
        model: The model, with its weights.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.stored = stored_tensors(model.graph)
        self._opsets = list(model.opset_import)
        self._nodes: list[NodeProto] = []
        self._made: dict[str, np.ndarray | None] = {}
        known = set(self.stored)
        for node in model.graph.node:
            read = names_read(node) - {''}
            if read and read <= known and node.op_type not in _NEVER:
                self._nodes.append(node)
                known.update(node.output)
        self._known = known

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._known

    def value(self, tensor: str) -> np.ndarray | None:
        """Reads or computes a tensor; None if it is no constant, or cannot be computed."""
        if tensor in self.stored:
            return decoded(self.stored[tensor])
        if tensor in self._known and tensor not in self._made:
            self._made[tensor] = self._compute(tensor)
        return self._made.get(tensor)

    def _compute(self, tensor: str) -> np.ndarray | None:
        """Runs the nodes that a tensor is made by."""
        needed = {tensor}
        nodes: list[NodeProto] = []
        for node in reversed(self._nodes):
            if needed.intersection(node.output):
                nodes.insert(0, node)
                needed |= names_read(node)
        stored = []
        for name in needed & self.stored.keys():  # a Constant node's tensor has another name
            stored.append(TensorProto())
            stored[-1].CopyFrom(self.stored[name])
            stored[-1].name = name
        outputs = [helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None)]
        graph = helper.make_graph(nodes, 'constant', [], outputs, stored)
        try:
            model = helper.make_model(graph, opset_imports=self._opsets)
            (value,) = ReferenceEvaluator(model).run(None, {})
        except Exception:  # an op that the evaluator does not have, in whatever words
            return None
        return np.asarray(value)
