"""Transformations of a Q/DQ graph before OpenVINO compiles it; they change no value.

OpenVINO's kernels want unsigned activations, while TensorRT's files have signed ones. On a CPU
without VNNI it is more than a matter of speed: with signed activations (and with unsigned ones
above 127) sums of two products overflow 16 bits and are cut off, which leaves 10 to 30 dB of a
layer. So tensors that cannot be negative are quantized onto 0..127 of an unsigned grid, where
nothing overflows, and rounding is put where OpenVINO fuses it into the layer before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmdet3d_quant.core.formats import INT8, UINT8
from mmdet3d_quant.engines.openvino.floats import (
    keep_layers_float,
    part_averages,
    part_mixed,
)
from mmdet3d_quant.engines.openvino.fusion import fuse_adds, split_convolutions
from mmdet3d_quant.engines.openvino.nodes import (
    identity,
    is_rounder,
    make_rounder,
    operators,
    range_of,
    replace,
    rounders,
    rounders_before,
    single,
    source,
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
    part_averages(model)
    _make_unsigned(model)
    part_mixed(model)
    keep_layers_float(model)
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

    for multiply in model.get_ordered_ops():
        node = _quantizer_of(multiply)
        if node is None:
            continue
        data, low, high = (node.input(i).get_source_output() for i in range(3))
        joined = opset13.fake_quantize(data, low, high, low, high, node.get_attributes()['levels'])
        joined.set_friendly_name(multiply.get_friendly_name())
        replace(multiply, joined)


def _quantizer_of(multiply: Any) -> Any:
    """The FakeQuantize onto integers that a Multiply takes back to real numbers, or None."""
    if multiply.get_type_name() != 'Multiply':
        return None
    scale, node, integers = single(multiply, 1), source(multiply), False
    zero: float | None = 0.0
    if node.get_type_name() == 'Subtract':
        zero, node = single(node, 1), source(node)
    while node is not None and node.get_type_name() == 'Convert':
        node, integers = source(node), True
    if not integers or node is None or node.get_type_name() != 'FakeQuantize':
        return None  # a product of other tensors
    ends = [end for end in (single(node, i) for i in range(1, 5)) if end is not None]
    if source(node).get_type_name() == 'Constant' or len(ends) < 4:
        return None  # a weight, or a range per channel
    if scale is None or zero is None:
        return None
    back = [(end - zero) * scale for end in ends[2:]]
    return node if np.allclose(back, ends[:2], 1e-6, 0) else None


def _round_before_pooling(model: Any) -> None:
    """Moves a rounder from behind a max pooling before it; the two commute."""
    for node in rounders(model):
        pool = source(node)
        readers = [target for output in pool.outputs() for target in output.get_target_inputs()]
        if pool.get_type_name() != 'MaxPool' or len(readers) > 1:
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
        key = (identity(data.get_node()), data.get_index(), range_of(node))
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
    """Moves the rounders of non-negative tensors to 0..127 of an unsigned grid of equal steps.

    A tensor that holds integers already stays: OpenVINO would round the bound of the clamp to one
    of them. So does a tensor that is joined with signed ones; see :func:`part_mixed`.
    """
    opset13 = operators()

    chosen = {}
    for node in rounders(model):
        data = node.input(0).get_source_output()
        held = any(True for _ in rounders_before(data.get_node()))
        if range_of(node)[0] < 0 and not held and _never_negative(data):
            chosen[identity(node)] = node
    joins = [list(rounders_before(n)) for n in model.get_ops() if n.get_type_name() == 'Concat']
    count = -1
    while count != len(chosen):  # until no join takes another one out
        count = len(chosen)
        for members in joins:
            if any(range_of(n)[0] < 0 and identity(n) not in chosen for n in members):
                for node in members:
                    chosen.pop(identity(node), None)
    for node in chosen.values():
        high = range_of(node)[1]
        data = node.input(0).get_source_output()
        rectifier = data.get_node()
        if rectifier.get_type_name() == 'Relu' and len(data.get_target_inputs()) == 1:
            data = rectifier.input(0).get_source_output()  # the clamp below rectifies, too
        limited = opset13.clamp(data, 0.0, high)
        replace(node, make_rounder(limited.output(0), 0.0, UINT8.qmax * (high / INT8.qmax), node))


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
