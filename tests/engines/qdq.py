"""Small Q/DQ graphs, node by node, for what compilers and linters say of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SIZE = 8, 16


@dataclass
class QDQ:
    """A graph that grows; ``x`` is its input, of shape (batch, channels, 16, 16).

    ``half`` makes its reals FP16: weights, scales, input and output.
    """

    batch: int | str = 1
    dtype: int = TensorProto.INT8
    channels: int = CHANNELS
    half: bool = False
    nodes: list = field(default_factory=list)
    stored: list = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def constant(self, value) -> str:
        name = f'c{len(self.stored)}'
        self.stored.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    @property
    def real(self) -> type:
        return np.float16 if self.half else np.float32

    def weight(self, *shape: int) -> str:
        return self.constant(self.rng.normal(size=shape).astype(self.real))

    def node(self, kind: str, *inputs: str, name: str = '', **attributes) -> str:
        out = f't{len(self.nodes)}'
        self.nodes.append(helper.make_node(kind, list(inputs), [out], name, **attributes))
        return out

    def qdq(self, x: str, scale=0.1, zero: int = 0, axis: int | None = None) -> str:
        """Q and DQ; ``scale`` is a number, numbers per channel, or the name of a tensor."""
        if not isinstance(scale, str):
            shape, scale = np.shape(scale), self.constant(np.asarray(scale, self.real))
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
        w = self.weight(self.channels, self.channels, 3, 3)
        if quantized:
            x, w = self.qdq(x, **qdq), self.qdq(w, [0.01] * self.channels, axis=0)
        return self.node('Conv', x, w, name=name, pads=[1] * 4)

    def model(self, y: str, opset: int | None = None, real: int | None = None):
        """The graph with output ``y``, of any shape; by default of opset 17, with FP16 19."""
        info = helper.make_tensor_value_info
        real = real or (TensorProto.FLOAT16 if self.half else TensorProto.FLOAT)
        graph = helper.make_graph(
            self.nodes,
            'small',
            [info('x', real, [self.batch, self.channels, SIZE, SIZE])],
            [info(y, real, None)],
            self.stored,
        )
        opsets = [helper.make_opsetid('', opset or (19 if self.half else 17))]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        return onnx.shape_inference.infer_shapes(model)

    def save(self, path, y: str, opset: int | None = None):
        """Writes the graph with output ``y``; returns the path."""
        onnx.save(self.model(y, opset), path)
        return path
