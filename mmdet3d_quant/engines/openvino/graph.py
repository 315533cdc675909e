"""Transformations of a Q/DQ graph before OpenVINO compiles it; they change no value.

OpenVINO's kernels want unsigned activations, while TensorRT's files have signed ones. On a CPU
without VNNI it is more than a matter of speed: with signed activations (and with unsigned ones
above 127) sums of two products overflow 16 bits and are cut off, which leaves 10 to 30 dB of a
layer. So tensors that cannot be negative are quantized onto 0..127 of an unsigned grid, where
nothing overflows, and rounding is put where OpenVINO fuses it into the layer before.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from mmdet3d_quant.core.formats import INT8, UINT8
from mmdet3d_quant.engines.openvino.fusion import fuse_adds, split_convolutions
from mmdet3d_quant.engines.openvino.nodes import (
    is_constant,
    is_rounder,
    make_rounder,
    operators,
    range_of,
    replace,
    rounders,
    single,
    source,
    value,
)

#: Operators with non-negative outputs, and those with non-negative outputs for such inputs. These
#: are OpenVINO's operators; ``export/nonnegative.py`` has ONNX's, and must know all that these say.
_RECTIFIERS = ('Relu', 'Sigmoid', 'SoftMax', 'Softmax', 'Exp', 'Abs')
_PASSING = ('MaxPool', 'AvgPool', 'Concat', 'Reshape', 'Transpose', 'Unsqueeze', 'Squeeze', 'Add')


def prepare(model: Any) -> None:
    """Applies all transformations to an ``openvino.Model`` in place.

    Args:
        model: Model as read from an ONNX file; one without Q/DQ nodes stays as it is.
    """
    _join_pairs(model)
    _share_equal(model)
    _round_once(model)
    _round_before_pooling(model)
    _make_unsigned(model)
    if overflows():
        _keep_signed_float(model)
    fuse_adds(model)
    split_convolutions(model)
    model.validate_nodes_and_infer_types()


def _join_pairs(model: Any) -> None:
    """Replaces each activation's Q/DQ pair by one equivalent FakeQuantize.

    OpenVINO reads QuantizeLinear as a FakeQuantize onto integers, followed by the subtraction and
    multiplication of DequantizeLinear. Its INT8 concat takes the integers' range for the real one
    and rounds to steps of about 2.0 (seen in 2024.6 to 2026.4: 10 dB instead of 130 dB). A
    FakeQuantize with equal input and output range avoids that.
    """
    opset13 = operators()

    for multiply in model.get_ops():
        if multiply.get_type_name() != 'Multiply':
            continue
        node = source(multiply)
        while node is not None and node.get_type_name() in ('Subtract', 'Convert'):
            node = source(node)
        if node is None or node.get_type_name() != 'FakeQuantize':
            continue
        data, low, high = (node.input(i).get_source_output() for i in range(3))
        if data.get_node().get_type_name() == 'Constant':
            continue  # a weight
        joined = opset13.fake_quantize(data, low, high, low, high, node.get_attributes()['levels'])
        joined.set_friendly_name(multiply.get_friendly_name())
        replace(multiply, joined)


def _round_before_pooling(model: Any) -> None:
    """Moves a rounder from behind a max pooling before it; the two commute."""
    for node in rounders(model):
        pool = source(node)
        if pool.get_type_name() != 'MaxPool' or len(pool.output(0).get_target_inputs()) > 1:
            continue
        low, high = range_of(node)
        inner = make_rounder(pool.input(0).get_source_output(), low, high, node)
        pool.input(0).replace_source_output(inner.output(0))
        replace(node, pool)


def _share_equal(model: Any) -> None:
    """Merges the rounders of one tensor that have equal ranges."""
    first: dict[tuple, Any] = {}
    for node in rounders(model):
        data = node.input(0).get_source_output()
        key = (data.get_node().get_friendly_name(), data.get_index(), range_of(node))
        if key in first:
            replace(node, first[key])
        else:
            first[key] = node


def _round_once(model: Any) -> None:
    """Removes a rounder behind a concat whose inputs all come from rounders of the same range."""
    for node in rounders(model):
        joined = source(node)
        if joined.get_type_name() != 'Concat':
            continue
        parts = [i.get_source_output().get_node() for i in joined.inputs()]
        if all(is_rounder(part) and range_of(part) == range_of(node) for part in parts):
            replace(node, joined)


def _make_unsigned(model: Any) -> None:
    """Moves the rounders of non-negative tensors to 0..127 of an unsigned grid of equal steps."""
    opset13 = operators()

    for node in rounders(model):
        low, high = range_of(node)
        data = node.input(0).get_source_output()
        if low >= 0 or not _never_negative(data):
            continue
        rectifier = data.get_node()
        if rectifier.get_type_name() == 'Relu' and len(data.get_target_inputs()) == 1:
            data = rectifier.input(0).get_source_output()  # the clamp below rectifies, too
        limited = opset13.clamp(data, 0.0, high)
        replace(node, make_rounder(limited.output(0), 0.0, UINT8.qmax * (high / INT8.qmax), node))


def _keep_signed_float(model: Any) -> None:
    """Dequantizes the weights of layers that read signed activations, so that they run in float."""
    opset13 = operators()

    for node in rounders(model):
        if range_of(node)[0] >= 0:
            continue
        for reader in _layers_after(node):
            weights = reader.input(1).get_source_output()
            if weights.get_node().get_type_name() != 'Constant' and is_constant(weights):
                reader.input(1).replace_source_output(opset13.constant(value(weights)).output(0))


def _layers_after(node: Any) -> Iterator[Any]:
    """Yields the layers with weights that read a node, directly or through concat and pooling."""
    for target in node.output(0).get_target_inputs():
        kind = target.get_node().get_type_name()
        if kind in ('Convolution', 'ConvolutionBackpropData', 'MatMul'):
            yield target.get_node()
        elif kind in ('Concat', 'MaxPool'):
            yield from _layers_after(target.get_node())


@lru_cache(maxsize=None)
def overflows() -> bool:
    """True if 16-bit sums of INT8 products saturate on this CPU; tested on one convolution."""
    import openvino as ov

    opset13 = operators()

    ends, ones = np.float32(-128), np.float32(127)
    x = opset13.parameter([1, 64, 8, 8], np.float32)
    rounded = opset13.fake_quantize(x, ends, ones, ends, ones, 256)
    integers = opset13.constant(np.full((64, 64, 1, 1), 127, np.int8))
    weights = opset13.multiply(opset13.convert(integers, np.float32), np.float32(1))
    y = opset13.convolution(rounded, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    compiled = ov.compile_model(
        ov.Model([y], [x]), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': 1}
    )
    sums = compiled(np.full((1, 64, 8, 8), 127, np.float32))[0]
    return bool(np.abs(sums / (64 * 127 * 127) - 1).max() > 1e-3)


def _never_negative(output: Any) -> bool:
    """True if a tensor is non-negative for every input of the graph."""
    node = output.get_node()
    kind = node.get_type_name()
    if kind == 'FakeQuantize':
        return single(node, 3) == 0 or _never_negative(node.input(0).get_source_output())
    if kind == 'Clamp':
        return node.get_attributes()['min'] >= 0
    if kind in _PASSING:
        data = node.inputs() if kind in ('Concat', 'Add') else node.inputs()[:1]
        return all(_never_negative(i.get_source_output()) for i in data)
    if kind == 'Interpolate' and node.get_attributes()['mode'] in ('nearest', 'linear_onnx'):
        return _never_negative(node.input(0).get_source_output())
    return kind in _RECTIFIERS
