"""An ONNX graph with look-ups for the rules: producer, readers and quantization of a tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto

from mmdet3d_quant.check.lint.constants import Constants
from mmdet3d_quant.check.lint.moves import FP8, reached, source_of_weight, unpadded
from mmdet3d_quant.check.lint.pair import Pair
from mmdet3d_quant.check.lint.profiles import profile_of
from mmdet3d_quant.export.graph import ONNX_DOMAINS, axis_of
from mmdet3d_quant.export.targets import TARGET_KEY, target_in
from mmdet3d_quant.files.limits import LARGEST

#: Convolutions, and the axis of their weight that indexes output channels.
CONVOLUTIONS = {'Conv': 0, 'ConvTranspose': 1}
#: Products of matrices; layers where one of the two is a weight.
PRODUCTS = ('Gemm', 'MatMul')
#: Types of integers with which a layer runs in INT8; those of TensorRT take UINT8 for INT8.
_BYTES = ('INT8', 'UINT8', '')
#: Places of a kernel up to which a convolution runs in FP8.
FP8_PLACES = 32


class LintError(ValueError):
    """A file is no ONNX graph that can be looked at."""


class Graph:
    """Looks into a model.

    Args:
        model: The model, with its weights.
        target: Engine that the graph is for, of ``profiles.PROFILES``; None asks the file, and
            takes TensorRT if it does not say.

    Attributes:
        profile: What that engine takes.
        told: The engine that the file says it is for; empty if it does not.
        opset: Version of ONNX's own operators.

    Raises:
        ValueError: If there is no such target.
    """

    def __init__(self, model: onnx.ModelProto, target: str | None = None) -> None:
        if model.functions:
            from onnx.inliner import inline_local_functions  # of onnx 1.15

            model = inline_local_functions(model)
        self.profile = profile_of(target or target_in(model))
        self.told = {p.key: p.value for p in model.metadata_props}.get(TARGET_KEY, '')
        self.opset = next((o.version for o in model.opset_import if o.domain in ONNX_DOMAINS), 0)
        self.graph = model.graph
        self.nodes = [n for n in model.graph.node if n.op_type != 'Constant']
        self.outputs = {o.name for o in model.graph.output}
        self.producer = {o: n for n in model.graph.node for o in n.output}
        self.readers: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
        for node in self.nodes:
            for i, name in enumerate(node.input):
                self.readers[name].append((node, i))
        self._constants = Constants(model)
        self._model = model
        self._number = {id(n): i for i, n in enumerate(self.nodes)}

    def for_target(self, name: str) -> Graph:
        """Looks at the same model as a file for another engine."""
        return Graph(self._model, name)

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
        return node.op_type in PRODUCTS and any(self._is_weight(t) for t in node.input[:2])

    def data(self, layer: NodeProto) -> str:
        """Name of the activation that a layer reads, zeros left out that it pads itself."""
        if layer.op_type == 'Conv':
            return unpadded(self, layer)
        return layer.input[1 - self._weight_input(layer)]

    def weight(self, layer: NodeProto) -> str:
        """Name of a layer's weight tensor, before it is moved."""
        return source_of_weight(self, layer.input[self._weight_input(layer)], 0)[0]

    def output_axis(self, layer: NodeProto) -> int:
        """Axis of a layer's weight, before it is moved, that indexes output channels."""
        which = self._weight_input(layer)
        if layer.op_type in CONVOLUTIONS:
            axis = CONVOLUTIONS[layer.op_type]
        else:
            turned = any(a.name == ('transA', 'transB')[which] and a.i for a in layer.attribute)
            axis = int(turned) if which == 0 else int(not turned)
        return source_of_weight(self, layer.input[which], axis)[1]

    def _weight_input(self, layer: NodeProto) -> int:
        """Which input is the weight: the second, unless only the first of a product is stored."""
        first = layer.op_type in PRODUCTS and not self._is_weight(layer.input[1])
        return int(not (first and self._is_weight(layer.input[0])))

    def _is_weight(self, tensor: str) -> bool:
        return self.is_stored(source_of_weight(self, tensor, 0)[0])

    def is_stored(self, tensor: str) -> bool:
        """Whether a tensor is stored in the file, as it is or quantized."""
        pair = self.pair(tensor)
        return self.is_constant(pair.source if pair else tensor)

    def read_pairs(self, layer: NodeProto) -> list[Pair]:
        """Pairs whose integers a layer reads as its activation, moved or not."""
        return reached(self, self.data(layer))

    def runs_in(self, node: NodeProto) -> str:
        """Tells in which of ``Int8`` and ``FP8`` a layer runs, as NVIDIA's compiler calls them.

        Returns:
            One of the two if both factors are quantized as the engine wants; else nothing.
        """
        read, weight = self.read_pairs(node), self.weight_pair(node)
        if node.op_type == 'ConvTranspose' and not self.profile.deconvolutions:
            return ''
        if not read or weight is None:
            return ''
        kinds = {pair.kind for pair in (*read, weight)}
        fp8 = self.profile.fp8 and kinds == {FP8} and self.places(node) <= FP8_PLACES
        if not fp8 and not kinds <= set(_BYTES):
            return ''
        if any(self.is_per_channel(pair, node) for pair in read):
            return ''
        one = weight.scale is None or weight.scale.size == 1 or node.op_type == 'ConvTranspose'
        fits = one or weight.axis == self.output_axis(node)
        return ('FP8' if fp8 else 'Int8') if fits else ''

    def places(self, layer: NodeProto) -> int:
        """Counts the places of a convolution's kernel; 1 of a product or if it is not known."""
        shape = self.shapes.get(layer.input[1], []) if layer.op_type in CONVOLUTIONS else []
        return prod(max(size, 1) for size in shape[2:])

    def is_int8(self, node: NodeProto) -> bool:
        """Whether both factors of a convolution or product are integers as the engine wants."""
        return self.runs_in(node) == 'Int8'

    def is_per_channel(self, pair: Pair, layer: NodeProto) -> bool:
        """Whether the engine takes the scale of a layer's activation for scales per channel."""
        if pair.scale is None or pair.scale.size > 1:
            return pair.scale is not None
        return self.profile.scalars and pair.dims > 0 and layer.op_type in CONVOLUTIONS

    def is_constant(self, tensor: str) -> bool:
        """Whether a tensor is stored in the file, or computed from stored ones only."""
        return tensor in self._constants

    def is_kept(self, tensor: str) -> bool:
        """Whether a tensor is stored in the file, or a copy of a stored one."""
        node = self.producer.get(tensor)
        if node is not None and node.op_type == 'Identity':
            return self.is_kept(node.input[0])
        return tensor in self._constants.stored

    def constant(self, tensor: str) -> np.ndarray | None:
        """Value of a constant tensor; None if it is none, or cannot be computed."""
        return self._constants.value(tensor)

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes as far as they are known; -1 for a dimension that is not."""
        known = {
            name: [d.dim_value if d.HasField('dim_value') else -1 for d in t.shape.dim]
            for name, t in self._inferred.items()
            if t.HasField('shape')
        }
        known.update((name, list(i.dims)) for name, i in self._constants.stored.items())
        return known

    @cached_property
    def types(self) -> dict[str, str]:
        """Types of tensors in ONNX's words, such as ``FLOAT16``, as far as they are known."""
        known = {name: t.elem_type for name, t in self._inferred.items()}
        known.update((name, i.data_type) for name, i in self._constants.stored.items())
        return {name: TensorProto.DataType.Name(kind) for name, kind in known.items() if kind}

    @cached_property
    def _inferred(self) -> dict[str, onnx.TypeProto.Tensor]:
        """Types and shapes that ONNX infers."""
        inferred = onnx.shape_inference.infer_shapes(self._model, data_prop=True).graph
        values = [*inferred.value_info, *inferred.input, *inferred.output]
        return {v.name: v.type.tensor_type for v in values}

    def pair(self, tensor: str) -> Pair | None:
        """Finds the Q/DQ pair that makes a tensor; None if no DequantizeLinear does."""
        dq = self.producer.get(tensor)
        if dq is None or dq.op_type != 'DequantizeLinear':
            return None
        q = self.producer.get(dq.input[0])
        q = q if q is not None and q.op_type == 'QuantizeLinear' else None
        scale, zero = self.grid(dq)
        source = (q or dq).input[0]
        value = self.constant(dq.input[1])
        dims = 0 if value is None else value.ndim
        blocks = any(a.name == 'block_size' and a.i for a in dq.attribute)
        axis = self.axis(dq, source)
        return Pair(dq, q, source, scale, zero, axis, dims, self.kind(q or dq), blocks)

    def kind(self, node: NodeProto) -> str:
        """Type of the integers of a Q or DQ, in ONNX's words; empty if it is not known."""
        for tensor in (*node.input[2:], *(node.input[:1] if node.op_type[0] == 'D' else ())):
            if tensor in self.types:
                return self.types[tensor]
        given = next((a.i for a in node.attribute if a.name == 'output_dtype'), 0)
        if given:
            return TensorProto.DataType.Name(given)
        return 'UINT8' if node.op_type == 'QuantizeLinear' else ''

    def axis(self, node: NodeProto, source: str) -> int:
        """Axis of a Q or DQ, counted from the front if the rank of its tensor is known."""
        axis, shape = axis_of(node), self.shapes.get(source)
        return axis + len(shape) if axis < 0 and shape is not None else axis

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
