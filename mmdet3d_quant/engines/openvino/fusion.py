"""Graph rewrites that save OpenVINO passes over memory: fused adds, split convolutions.

Without them the camera branch of a ResNet-50 BEVFusion spends a fifth of its time on copies:
residual adds in float32, and a result that is sliced by channels. Values stay the same
up to float32's rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.formats import INT8
from mmdet3d_quant.engines.openvino.floats import keep_real
from mmdet3d_quant.engines.openvino.nodes import (
    is_constant,
    is_rounder,
    operators,
    range_of,
    replace,
    source,
    value,
)


def fuse_adds(model: Any) -> None:
    """Makes OpenVINO fuse a residual add into the convolution before it.

    OpenVINO fuses an add into a convolution if the two are neighbours or a FakeQuantize stands
    between them. Its own passes insert a multiplication there, by the scale of the other summand,
    which prevents the fusion: the convolution then writes float32, and the add is a pass over
    memory of its own. So this inserts a FakeQuantize over the convolution's whole output range
    with as many levels as float32, which changes no value.

    Args:
        model: An ``openvino.Model``, changed in place.
    """
    for add in model.get_ordered_ops():
        if add.get_type_name() != 'Add':
            continue
        sides = [i.get_source_output() for i in add.inputs()]
        for i, (output, other) in enumerate((sides, sides[::-1])):
            if not is_rounder(other.get_node()) or len(output.get_target_inputs()) > 1:
                continue
            layer = _layer(output)
            if layer is not None:
                limit = layer.limit()
                if limit > 0:
                    add.input(i).replace_source_output(keep_real(output, -limit, limit))
                break


def split_convolutions(model: Any) -> None:
    """Splits a convolution whose output is only sliced by channels: one convolution per slice.

    Args:
        model: An ``openvino.Model``, changed in place.
    """
    for node in model.get_ordered_ops():
        slices = [i.get_node() for o in node.outputs() for i in o.get_target_inputs()]
        if not slices or any(part.get_type_name() != 'Slice' for part in slices):
            continue
        layer = _layer(node.output(0))
        if layer is None or layer.integers is None:
            continue
        groups = [_channels(part, len(layer.weights)) for part in slices]
        if None not in groups:
            for part, channels in strict_zip(slices, groups):
                replace(part, layer.part(channels))


@dataclass(frozen=True)
class _Layer:
    """A convolution with a quantized input and constant weights, and perhaps a bias.

    Attributes:
        node: The convolution.
        largest: Upper bound of the absolute input values.
        weights: Its weights, dequantized, (out, in, kH, kW).
        bias: Added afterwards, broadcast as numpy does, (1, out or 1, ...); or None.
    """

    node: Any
    largest: float
    weights: np.ndarray
    bias: np.ndarray | None

    def limit(self) -> float:
        """Upper bound of the absolute output values."""
        sums = self.largest * np.abs(self.weights).reshape(len(self.weights), -1).sum(1)
        return float(sums.max() + (0 if self.bias is None else np.abs(self.bias).max()))

    @cached_property
    def scale(self) -> np.ndarray | None:
        """Scales of the weights, (out, 1, 1, 1); None if they are not stored as integers."""
        multiply = self.node.input(1).get_source_output().get_node()
        if multiply.get_type_name() != 'Multiply':
            return None
        scale = value(multiply.input(1).get_source_output())
        shape = len(self.weights), *(1,) * (self.weights.ndim - 1)
        return np.broadcast_to(scale, shape) if scale.size in (1, len(self.weights)) else None

    @cached_property
    def integers(self) -> np.ndarray | None:
        """Quantized weights, int8 (out, in, kH, kW); None if they are no multiples of the scale."""
        if self.scale is None:
            return None
        steps = self.weights / self.scale
        integers = np.rint(steps)
        same = np.abs(integers - steps).max() < 1e-3 and np.abs(integers).max() <= INT8.qmax
        return integers.astype(np.int8) if same else None

    def part(self, channels: slice) -> Any:
        """Creates the convolution, with bias, for a slice of the output channels."""
        opset13 = operators()

        assert self.integers is not None and self.scale is not None
        integers = opset13.convert(opset13.constant(self.integers[channels]), np.float32)
        weights = opset13.multiply(integers, opset13.constant(self.scale[channels].copy()))
        options = self.node.get_attributes()
        made = opset13.convolution(
            self.node.input(0).get_source_output(),
            weights,
            options['strides'],
            options['pads_begin'],
            options['pads_end'],
            options['dilations'],
            options['auto_pad'],
        )
        name = f'{self.node.get_friendly_name()}/{channels.start}..{channels.stop - 1}'
        made.set_friendly_name(name)
        if self.bias is None:
            return made
        bias = self.bias if self.bias.shape[1] == 1 else self.bias[:, channels]
        return opset13.add(made, bias.copy())


def _layer(output: Any) -> _Layer | None:
    """Matches the convolution that makes a tensor; None for any other node.

    Args:
        output: Tensor after the convolution, or after the addition of its bias.
    """
    node, bias = output.get_node(), None
    if node.get_type_name() == 'Add':
        shaped = node.input(1).get_source_output()
        data = shaped
        if data.get_node().get_type_name() == 'Reshape':  # to a shape that is computed
            data = data.get_node().input(0).get_source_output()
        if shaped.get_partial_shape().is_dynamic or not is_constant(data):
            return None
        shape, rank = tuple(shaped.get_shape()), len(output.get_partial_shape())
        bias = value(data).reshape((1,) * (rank - len(shape)) + shape)
        node = source(node)
    if node.get_type_name() != 'Convolution':
        return None
    largest, weights = _largest(source(node)), node.input(1).get_source_output()
    if largest is None or not is_constant(weights):
        return None
    layer = _Layer(node, largest, value(weights), bias)
    fits = (
        bias is None or bias.ndim == layer.weights.ndim and bias.shape[1] in (1, len(layer.weights))
    )
    return layer if fits else None


def _largest(node: Any) -> float | None:
    """Largest absolute value of a rounded tensor; None if the tensor is not rounded."""
    if is_rounder(node):
        return float(np.abs(range_of(node)).max())
    if node.get_type_name() not in ('Concat', 'MaxPool'):
        return None
    parts = [_largest(i.get_source_output().get_node()) for i in node.inputs()]
    known = [part for part in parts if part is not None]
    return max(known) if len(known) == len(parts) else None


def _channels(node: Any, count: int) -> slice | None:
    """Channels that a Slice takes; None if it has computed bounds, another axis or another step."""
    numbers = [i.get_source_output().get_node() for i in node.inputs()[1:]]
    if len(numbers) != 4:
        return None
    if any(n.get_type_name() != 'Constant' or n.data.size != 1 for n in numbers):
        return None
    start, stop, step, axis = (int(n.data.reshape(())) for n in numbers)
    return slice(*slice(start, stop).indices(count)[:2]) if (step, axis) == (1, 1) else None
