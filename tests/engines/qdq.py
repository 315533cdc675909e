"""Small Q/DQ graphs, node by node, for what compilers and linters say of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SIZE = 8, 16


@dataclass
class QDQ:
    """A graph that grows; ``x`` is its input, of shape (batch, 8, 16, 16)."""

    batch: int | str = 1
    dtype: int = TensorProto.INT8
    nodes: list = field(default_factory=list)
    stored: list = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def constant(self, value) -> str:
        name = f'c{len(self.stored)}'
        self.stored.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self.rng.normal(size=shape).astype(np.float32))

    def node(self, kind: str, *inputs: str, name: str = '', **attributes) -> str:
        out = f't{len(self.nodes)}'
        self.nodes.append(helper.make_node(kind, list(inputs), [out], name, **attributes))
        return out

    def qdq(self, x: str, scale=0.1, zero: int = 0, axis: int | None = None) -> str:
        """Q and DQ; ``scale`` is a number, numbers per channel, or the name of a tensor."""
        if not isinstance(scale, str):
            shape, scale = np.shape(scale), self.constant(np.asarray(scale, np.float32))
        else:
            shape = ()
        name = f'z{len(self.stored)}'
        kind, count = self.dtype, int(np.prod(shape))
        self.stored.append(helper.make_tensor(name, kind, shape, [zero] * count))
        axes = {} if axis is None else {'axis': axis}
        q = self.node('QuantizeLinear', x, scale, name, name=f'Q{len(self.nodes)}', **axes)
        return self.node('DequantizeLinear', q, scale, name, name=f'DQ{len(self.nodes)}', **axes)

    def conv(self, x: str, name: str, quantized: bool = True, **qdq) -> str:
        """A 3x3 convolution, its input and weight quantized or not."""
        w = self.weight(CHANNELS, CHANNELS, 3, 3)
        if quantized:
            x, w = self.qdq(x, **qdq), self.qdq(w, [0.01] * CHANNELS, axis=0)
        return self.node('Conv', x, w, name=name, pads=[1] * 4)

    def save(self, path, y: str, opset: int = 17):
        """Writes the graph with output ``y``, of any shape; returns the path."""
        info = helper.make_tensor_value_info
        shape = [self.batch, CHANNELS, SIZE, SIZE]
        graph = helper.make_graph(
            self.nodes,
            'small',
            [info('x', TensorProto.FLOAT, shape)],
            [info(y, TensorProto.FLOAT, None)],
            self.stored,
        )
        opsets = [helper.make_opsetid('', opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        onnx.save(onnx.shape_inference.infer_shapes(model), path)
        return path
