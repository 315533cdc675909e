"""An ONNX graph with look-ups for the rules: producer, readers and quantization of a tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, numpy_helper

from mmdet3d_quant.export.graph import axis_of, stored_tensors
from mmdet3d_quant.export.targets import target_in, target_of
from mmdet3d_quant.files.limits import LARGEST

#: Convolutions, and the axis of their weight that indexes output channels.
CONVOLUTIONS = {'Conv': 0, 'ConvTranspose': 1}
#: Products of matrices; layers where one of the two is a weight.
PRODUCTS = ('Gemm', 'MatMul')


class LintError(ValueError):
    """A file is no ONNX graph that can be looked at."""


@dataclass(frozen=True)
class Pair:
    """A DequantizeLinear and what comes before it.

    Attributes:
        dq: The DequantizeLinear.
        q: The QuantizeLinear before it; None for integers stored in the file.
        source: The tensor that is quantized.
        scale: Flat float array, or None if it is no constant.
        zero: Zero points, flat, or None if absent or no constant.
        axis: Channel axis of ``scale``.
    """

    dq: NodeProto
    q: NodeProto | None
    source: str
    scale: np.ndarray | None
    zero: np.ndarray | None
    axis: int


class Graph:
    """Looks into a model.

    Args:
        model: The model, with its weights.
        target: Engine that the graph is for, of ``export.targets.TARGETS``; None asks the file,
            and takes TensorRT if it does not say.

    Attributes:
        target: That engine.

    Raises:
        ValueError: If there is no such target.
    """

    def __init__(self, model: onnx.ModelProto, target: str | None = None) -> None:
        self.target = target_of(target or target_in(model))
        self.graph = model.graph
        self.nodes = [n for n in model.graph.node if n.op_type != 'Constant']
        self.outputs = {o.name for o in model.graph.output}
        self.producer = {o: n for n in model.graph.node for o in n.output}
        self.readers: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
        for node in self.nodes:
            for i, name in enumerate(node.input):
                self.readers[name].append((node, i))
        self._stored = stored_tensors(model.graph)
        self._model = model
        self._number = {id(n): i for i, n in enumerate(self.nodes)}

    def __iter__(self) -> Iterator[NodeProto]:
        return iter(self.nodes)

    def name(self, node: NodeProto) -> str:
        """Returns a node's name, or else its type and position."""
        return node.name or f'{node.op_type}#{self._number[id(node)]}'

    def of(self, *types: str) -> Iterator[NodeProto]:
        """Nodes of some types, in the order of the file."""
        return (n for n in self.nodes if n.op_type in types)

    def layers(self) -> Iterator[NodeProto]:
        """Nodes with a weight that an engine may run in INT8, in the order of the file."""
        return (n for n in self.nodes if self.is_layer(n))

    def is_layer(self, node: NodeProto) -> bool:
        """Whether a node is a convolution, or a product with a stored matrix."""
        if node.op_type in CONVOLUTIONS:
            return True
        return node.op_type in PRODUCTS and self.is_stored(self.weight(node))

    def weight(self, layer: NodeProto) -> str:
        """Name of a layer's weight tensor; of a matrix product before it is transposed."""
        tensor = layer.input[1]
        maker = self.producer.get(tensor)
        if layer.op_type in PRODUCTS and maker is not None and maker.op_type == 'Transpose':
            return maker.input[0]
        return tensor

    def output_axis(self, layer: NodeProto) -> int:
        """Axis of a layer's weight that indexes output channels."""
        if layer.op_type in CONVOLUTIONS:
            return CONVOLUTIONS[layer.op_type]
        turned = any(a.name == 'transB' and a.i for a in layer.attribute)
        return 0 if turned != (self.weight(layer) != layer.input[1]) else 1

    def is_stored(self, tensor: str) -> bool:
        """Whether a tensor is stored in the file, as it is or quantized."""
        pair = self.pair(tensor)
        return self.is_constant(pair.source if pair else tensor)

    def is_int8(self, node: NodeProto) -> bool:
        """Whether both factors of a convolution or product are quantized."""
        return self.pair(node.input[0]) is not None and self.weight_pair(node) is not None

    def is_constant(self, tensor: str) -> bool:
        """Whether a tensor is stored in the file."""
        return tensor in self._stored

    def constant(self, tensor: str) -> np.ndarray | None:
        """Value of a stored tensor."""
        found = self._stored.get(tensor)
        return None if found is None else numpy_helper.to_array(found)

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes as far as they are known; -1 for a dimension that is not."""
        inferred = onnx.shape_inference.infer_shapes(self._model, data_prop=True).graph
        values = [*inferred.value_info, *inferred.input, *inferred.output]
        known = {
            v.name: [d.dim_value if d.HasField('dim_value') else -1 for d in t.shape.dim]
            for v in values
            for t in (v.type.tensor_type,)
            if t.HasField('shape')
        }
        known.update((name, list(i.dims)) for name, i in self._stored.items())
        return known

    def pair(self, tensor: str) -> Pair | None:
        """Finds the Q/DQ pair that makes a tensor; None if no DequantizeLinear does."""
        dq = self.producer.get(tensor)
        if dq is None or dq.op_type != 'DequantizeLinear':
            return None
        q = self.producer.get(dq.input[0])
        q = q if q is not None and q.op_type == 'QuantizeLinear' else None
        scale, zero = self.grid(dq)
        return Pair(dq, q, (q or dq).input[0], scale, zero, axis_of(dq))

    def grid(self, node: NodeProto) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Scale and zero point of a Q or DQ, flat; None where they are no constants."""
        scale = self.constant(node.input[1])
        zero = self.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        return tuple(None if v is None else v.reshape(-1) for v in (scale, zero))  # type: ignore

    def weight_pair(self, layer: NodeProto) -> Pair | None:
        """Finds the Q/DQ pair of a layer's weight, or of the second factor of a product."""
        return self.pair(self.weight(layer))

    def holds_weight(self, pair: Pair) -> bool:
        """Whether a pair quantizes stored values, not an activation."""
        return self.is_constant(pair.source)


def read_graph(path: str | Path, target: str | None = None) -> Graph:
    """Reads a file.

    Args:
        path: An ONNX file, with its external weights beside it if it has some.
        target: As :class:`Graph` takes it.

    Raises:
        LintError: If it is missing, empty, truncated, too large for one message, no ONNX, or
            lacks its weights; says which and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise LintError(f'{path} does not exist')
    size = path.stat().st_size
    if size >= LARGEST:
        raise LintError(
            f'{path} has {size / 2**30:.1f} GiB; ONNX files end at 2 GiB. Save it with '
            'onnx.save(model, path, save_as_external_data=True)'
        )
    try:
        model = onnx.load(str(path))
    except DecodeError:
        raise LintError(f'{path} is no ONNX file, or was cut off ({size} bytes)') from None
    except (FileNotFoundError, onnx.checker.ValidationError) as err:
        raise LintError(f'{path} keeps weights in another file, which is missing: {err}') from None
    if not model.graph.node:
        raise LintError(f'{path} is no ONNX file, or its graph is empty')
    return Graph(model, target)
