"""Rules of the values of scales, zero points and weights."""

from __future__ import annotations

from typing import Iterator

import numpy as np
from onnx import NodeProto

from mmdet3d_quant.check.lint.graph import Graph
from mmdet3d_quant.check.lint.moves import FP8
from mmdet3d_quant.check.lint.rules.registry import Found, rule
from mmdet3d_quant.core.formats import INT8, MIN_AMAX, STORED
from mmdet3d_quant.export.graph import nonfinite_tensors
from mmdet3d_quant.export.weight_scales import LEAST_HALF

HUGE = 1e4


def _grids(graph: Graph) -> Iterator[tuple[NodeProto, np.ndarray | None, np.ndarray | None]]:
    for node in graph.of('QuantizeLinear', 'DequantizeLinear'):
        yield node, *graph.grid(node)


def _scales(graph: Graph) -> Iterator[tuple[NodeProto, np.ndarray]]:
    """Every Q and DQ whose scale is a constant, with it, in float64."""
    for node, scale, _ in _grids(graph):
        if scale is not None:
            yield node, scale.astype(np.float64)


@rule(
    'Q20',
    'zero point is not 0',
    'TensorRT takes symmetric quantization only',
    'calibrate symmetric ranges',
)
def _zero_point(graph: Graph) -> Found:
    for node, _, zero in _grids(graph):
        if zero is not None and zero.any():
            case = 'FP8' if graph.kind(node) == FP8 else 'integers'
            yield node, f'zero point {zero[zero != 0][0]}', case


@rule(
    'Q21',
    'unsigned integers',
    'TensorRT takes INT8 only, OpenVINO activations of both kinds; ONNX makes a missing zero point '
    'UINT8',
    'use a zero point of type int8',
)
def _unsigned(graph: Graph) -> Found:
    for node in graph.of('QuantizeLinear', 'DequantizeLinear'):
        stored = graph.is_constant(node.input[0])
        if graph.kind(node) != 'UINT8' or (graph.profile.unsigned and not stored):
            continue
        if node.op_type == 'DequantizeLinear' and stored:
            yield node, f'{node.input[0]} is stored as UINT8', 'stored'
        elif len(node.input) > 2 and node.input[2]:
            weight = stored or graph.is_stored(node.output[0])
            yield node, 'zero point of type uint8', 'weight' if weight else 'UINT8'
        elif any(a.name == 'output_dtype' for a in node.attribute):
            yield node, 'output_dtype is UINT8', 'output_dtype'
        elif node.op_type == 'QuantizeLinear':  # a DQ takes the type of its input
            yield node, 'no zero point', 'no zero point'


@rule(
    'Q22',
    'scale is not finite',
    'every value becomes NaN',
    'calibrate again: a batch had NaN or infinity in it',
)
def _not_finite(graph: Graph) -> Found:
    for node, scale in _scales(graph):
        if not np.isfinite(scale).all():
            case = 'NaN' if np.isnan(scale).any() else 'infinite'
            yield node, f'{(~np.isfinite(scale)).sum()} of {scale.size} scales', case


@rule(
    'Q23',
    'scale is 0 or negative',
    'divides by zero, or turns signs round; TensorRT refuses it',
    'keep ranges above zero',
)
def _not_positive(graph: Graph) -> Found:
    for node, scale in _scales(graph):
        if (scale <= 0).any():
            yield node, f'scale {scale[scale <= 0][0]:g}', ''


@rule(
    'Q24',
    'scale is 0 in FP16',
    'TensorRT refuses it where the graph is typed FP16, and smaller ones have no reciprocal',
    'a weight channel next to zero: export it with a scale of 2**-24 or more, its integers are '
    'zero at any; else scale the tensor up, or keep its layer float',
)
def _tiny(graph: Graph) -> Found:
    for node, scale in _scales(graph):
        small = scale[(scale > 0) & (scale <= LEAST_HALF / 2)]
        if len(small):
            yield node, f'scale {small[0]:.3g}', ''


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
            yield node, f'scale {large[0]:.3g}', ''


@rule(
    'Q26',
    'dead range',
    'the tensor was all zeros when it was calibrated; whatever it holds later is clipped to that',
    'calibrate on data that reach the layer',
)
def _dead(graph: Graph) -> Found:
    for node, scale in _scales(graph):
        least = MIN_AMAX / STORED.get(graph.kind(node), INT8).qmax  # of a tensor of zeros
        dead = ((scale >= 0.99 * least) & (scale <= 1.01 * least)).all()
        if node.op_type == 'QuantizeLinear' and dead:
            yield node, f'scale {scale.flat[0]:.3g}', ''


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
            yield node, f'{tensor}: {share}', ''


@rule(
    'Q27',
    'scale is not constant',
    "engines need scales when they build; NVIDIA's compiler crashes on one that depends on data",
    'export with fixed ranges',
)
def _not_constant(graph: Graph) -> Found:
    for node in graph.of('QuantizeLinear', 'DequantizeLinear'):
        if not graph.is_constant(node.input[1]):
            yield node, f'scale {node.input[1]} is computed from data', 'data'
        elif not graph.is_kept(node.input[1]):
            yield node, f'scale {node.input[1]} is computed from constants', 'constants'


@rule(
    'Q34',
    'bias does not fit into INT32',
    'engines that add it in steps of input times weight scale, as ONNX Runtime does by default, '
    'clip it',
    'raise the weight scale of the channel to |bias| / (input scale * 2**30) or more',
)
def _bias(graph: Graph) -> Found:
    for node in graph.layers():
        bias = graph.constant(node.input[2]) if len(node.input) > 2 else None
        of_input, of_weight = graph.read_pairs(node)[:1], graph.weight_pair(node)
        if bias is None or not of_input or of_weight is None:
            continue
        one, many = of_input[0].scale, of_weight.scale
        if one is None or many is None or one.size > 1 or bias.size % many.size:
            continue
        if graph.runs_in(node) == 'FP8':
            continue  # adds it in float
        step = one.astype(np.float64) * many
        overflows = np.abs(bias.reshape(-1, many.size)) > np.iinfo(np.int32).max * step
        if (step > 0).all() and overflows.any():
            yield node, f'{overflows.sum()} of {bias.size} channels', ''
