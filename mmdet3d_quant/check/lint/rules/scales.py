"""Rules of the values of scales, zero points and weights."""

from __future__ import annotations

from typing import Iterator

import numpy as np
from onnx import NodeProto

from mmdet3d_quant.check.lint.graph import Graph
from mmdet3d_quant.check.lint.rules.registry import Found, rule
from mmdet3d_quant.core.formats import INT8, MIN_AMAX
from mmdet3d_quant.export.graph import nonfinite_tensors

#: The scale of a tensor that was all zeros while calibrating.
DEAD = MIN_AMAX / INT8.qmax
HUGE = 1e4


def _grids(graph: Graph) -> Iterator[tuple[NodeProto, np.ndarray | None, np.ndarray | None]]:
    for node in graph.of('QuantizeLinear', 'DequantizeLinear'):
        yield node, *graph.grid(node)


def _scales(graph: Graph) -> Iterator[tuple[NodeProto, np.ndarray]]:
    """Every Q and DQ whose scale is a constant, with it."""
    return ((node, scale) for node, scale, _ in _grids(graph) if scale is not None)


@rule(
    'Q20',
    'zero point is not 0',
    'TensorRT takes symmetric quantization only',
    'calibrate symmetric ranges',
)
def _zero_point(graph: Graph) -> Found:
    for node, _, zero in _grids(graph):
        if zero is not None and zero.any():
            yield node, f'zero point {zero[zero != 0][0]}'


@rule(
    'Q21',
    'unsigned integers',
    'TensorRT takes INT8 only, OpenVINO activations of both kinds; ONNX makes a missing zero point '
    'UINT8',
    'use a zero point of type int8',
)
def _unsigned(graph: Graph) -> Found:
    for node in graph.of('QuantizeLinear', 'DequantizeLinear'):
        if graph.target.unsigned and not graph.is_constant(node.input[0]):
            continue
        if len(node.input) < 3 or not node.input[2]:
            # A DQ takes the type of its input: a QuantizeLinear decides for both.
            if node.op_type == 'QuantizeLinear':
                yield node, 'no zero point'
            continue
        zero = graph.constant(node.input[2])
        if zero is not None and zero.dtype.kind == 'u':
            yield node, f'zero point of type {zero.dtype}'


@rule(
    'Q22',
    'scale is not finite',
    'every value becomes NaN',
    'calibrate again: a batch had NaN or infinity in it',
)
def _not_finite(graph: Graph) -> Found:
    for node, scale in _scales(graph):
        if not np.isfinite(scale).all():
            yield node, f'{(~np.isfinite(scale)).sum()} of {scale.size} scales'


@rule(
    'Q23',
    'scale is 0 or negative',
    'divides by zero, or turns signs round; TensorRT refuses it',
    'keep ranges above zero',
)
def _not_positive(graph: Graph) -> Found:
    for node, scale in _scales(graph):
        if (scale <= 0).any():
            yield node, f'scale {scale[scale <= 0][0]:g}'


@rule(
    'Q24',
    'scale is next to 0',
    'its reciprocal overflows, or the scale does when it is stored in FP16',
    f'keep ranges at {MIN_AMAX:.2g} or more',
)
def _tiny(graph: Graph) -> Found:
    for node, scale in _scales(graph):
        small = scale[(scale > 0) & (scale < 0.99 * DEAD)]
        if len(small):
            yield node, f'scale {small[0]:.3g}'


@rule(
    'Q25',
    'scale is huge',
    'ordinary values all become 0',
    'look for an outlier in the calibration data',
)
def _huge(graph: Graph) -> Found:
    for node, scale in _scales(graph):
        large = scale[np.isfinite(scale) & (scale > HUGE)]
        if len(large):
            yield node, f'scale {large[0]:.3g}'


@rule(
    'Q26',
    'dead range',
    'the tensor was all zeros when it was calibrated; whatever it holds later is clipped to that',
    'calibrate on data that reach the layer',
)
def _dead(graph: Graph) -> Found:
    for node in graph.of('QuantizeLinear'):
        scale, _ = graph.grid(node)
        if scale is not None and ((scale >= 0.99 * DEAD) & (scale <= 1.01 * DEAD)).all():
            yield node, f'scale {scale.flat[0]:.3g}'


@rule(
    'Q33',
    'weight or bias is not finite',
    'every value behind it becomes NaN',
    'export a checkpoint from before the training diverged',
    floats=True,
)
def _odd_weight(graph: Graph) -> Found:
    for node, tensor, share in nonfinite_tensors(graph.graph):
        scales = node.input[1:] if node.op_type in ('QuantizeLinear', 'DequantizeLinear') else ()
        if tensor not in scales:  # which is Q22
            yield node, f'{tensor}: {share}'


@rule(
    'Q27',
    'scale is not constant',
    'engines need scales when they are built',
    'export with fixed ranges',
)
def _not_constant(graph: Graph) -> Found:
    for node, scale, _ in _grids(graph):
        if scale is None:
            yield node, f'scale {node.input[1]} is computed'
