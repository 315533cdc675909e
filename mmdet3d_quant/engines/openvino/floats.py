"""Parts of a Q/DQ graph that stay float, since OpenVINO computes them wrongly on integers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from mmdet3d_quant.engines.openvino.nodes import (
    is_constant,
    is_rounder,
    makers_before,
    operators,
    range_of,
    rounders_before,
    single,
    source,
    value,
)

#: Layers with weights.
_LAYERS = (
    'Convolution',
    'ConvolutionBackpropData',
    'GroupConvolution',
    'GroupConvolutionBackpropData',
    'MatMul',
)
#: Levels of a FakeQuantize that is as fine as float32 itself, and has a level at 0.
_FLOAT_LEVELS = 2**24 + 1


def keep_real(output: Any, low: float, high: float) -> Any:
    """Adds a FakeQuantize as fine as float32, behind which OpenVINO keeps no integers.

    Its range ends at a power of two, so that 0 and the values of a grid stay what they are.

    Args:
        output: Tensor, all of whose values lie between ``low`` and ``high``.
        low: Least value.
        high: Largest value.
    """
    top = 2.0 ** np.ceil(np.log2(max(-low, high)))
    ends = np.float32(-top if low < 0 else 0), np.float32(top)
    return operators().fake_quantize(output, *ends, *ends, _FLOAT_LEVELS).output(0)


def part_averages(model: Any) -> None:
    """Averages and pads with other numbers than 0 in float.

    OpenVINO rounds averages of integers to integers, and takes the number of a Pad for one.
    """
    for node in model.get_ordered_ops():
        padded = node.get_type_name() == 'Pad' and len(node.inputs()) > 3 and single(node, 3) != 0
        if node.get_type_name() == 'AvgPool' or padded:
            _part(node.input(0))


def part_mixed(model: Any) -> None:
    """Joins tensors of several ranges in float, signed and unsigned ones above all.

    OpenVINO would put the integers of all on one grid, with fewer steps for each.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == 'Concat' and len(set(_ranges(node))) > 1:
            for target in node.inputs():
                _part(target)


def _part(target: Any) -> None:
    """Keeps OpenVINO from passing integers on to an input of a node.

    A tensor that holds others besides, or none, is float already, and its range is unknown.
    """
    output = target.get_source_output()
    makers = list(makers_before(output.get_node()))
    if all(map(is_rounder, makers)):
        ranges = [range_of(maker) for maker in makers]
        low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
        target.replace_source_output(keep_real(output, min(low, 0.0), max(high, 0.0)))


def _ranges(node: Any) -> list[tuple[float, float]]:
    """Ranges of the rounders whose integers a node holds."""
    return [range_of(rounder) for rounder in rounders_before(node)]


def keep_layers_float(model: Any) -> None:
    """Keeps layers in float whose INT8 kernel is wrong for signed activations.

    Without VNNI these are all layers, and products of two activations; else transposed convolutions
    of unusual sizes.
    """
    opset13 = operators()

    for node in model.get_ordered_ops():
        if node.get_type_name() not in _LAYERS or not (overflows() or _is_unusual(node)):
            continue
        weights = node.input(1).get_source_output()
        if not any(low < 0 for low, _ in _ranges(source(node))):
            continue
        if not is_constant(weights):
            _part(node.input(0))
        elif weights.get_node().get_type_name() != 'Constant':
            node.input(1).replace_source_output(opset13.constant(value(weights)).output(0))


def _is_unusual(node: Any) -> bool:
    """True for transposed convolutions that OpenVINO computes wrongly on signed integers.

    Found by trial over kernels to 5, strides to 4, paddings to 2 and dilations to 2 (2026.4, CPU
    with VNNI); right are strides to 2 with larger kernels, and kernels that do not overlap.
    """
    if not node.get_type_name().endswith('BackpropData'):
        return False
    options = node.get_attributes()
    kernel = node.input(1).get_partial_shape().to_shape()[-len(options['strides']) :]
    for size, stride, dilation, *pads in zip(
        kernel,
        options['strides'],
        options['dilations'],
        options['pads_begin'],
        options['pads_end'],
    ):
        apart = size == stride and not any(pads)
        usual = stride <= 2 and size > 1 and max(pads) < size
        if dilation > 1 or not (apart or usual):
            return True
    return False


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
