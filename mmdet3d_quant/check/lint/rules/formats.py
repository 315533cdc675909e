"""Rules of how a file writes Q and DQ: inputs, types, opset, operators."""

from __future__ import annotations

from mmdet3d_quant.check.lint.graph import Graph
from mmdet3d_quant.check.lint.moves import FP8
from mmdet3d_quant.check.lint.rules.helpers import all_pairs
from mmdet3d_quant.check.lint.rules.registry import DYNAMIC_OPS, INTEGER_OPS, Found, rule

#: Integers and small floats that are no INT8 or UINT8, by the case of Q41; FP8 is all right where
#: an engine has it.
_OTHERS = {
    'INT16': ('INT16', 'UINT16'),
    'INT4': ('INT4', 'UINT4', 'INT2', 'UINT2'),
    'FP8': (FP8,),
    'other FP8': ('FLOAT8E4M3FNUZ', 'FLOAT8E5M2', 'FLOAT8E5M2FNUZ', 'FLOAT4E2M1'),
}


#: The first opset with FP8.
FIRST_FP8 = 19


@rule(
    'Q35',
    'Q or DQ without a zero point',
    'the parser of TensorRT 8 reads three inputs of each',
    'give every Q and DQ a zero point, 0 of type int8',
)
def _third_input(graph: Graph) -> Found:
    for node in graph.of('QuantizeLinear', 'DequantizeLinear'):
        if graph.profile.zero_points and (len(node.input) < 3 or not node.input[2]):
            yield node, f'{len(node.input)} inputs', ''


@rule(
    'Q39',
    'scale of another type than engines read',
    'a DQ makes values of the type of its scale, which a layer of another type refuses; the parser '
    'of TensorRT 8 reads the bytes of any scale as float32',
    'write scales in the type of the tensor, and float32 for TensorRT 8',
)
def _scale_type(graph: Graph) -> Found:
    for node in graph.of('QuantizeLinear', 'DequantizeLinear'):
        scale, tensor = (graph.types.get(name) for name in (node.input[1], node.input[0]))
        if graph.profile.float_scales and scale in ('FLOAT16', 'BFLOAT16'):
            yield node, f'scale of type {scale}', 'FP16'
        elif node.op_type == 'QuantizeLinear' and {scale, tensor} == {'FLOAT', 'FLOAT16'}:
            yield node, f'scale {scale}, tensor {tensor}', 'other than its tensor'


@rule(
    'Q40',
    'opset beyond what the parser supports',
    'operators may be read by an older definition',
    'export with that opset or less; scales are then float32',
)
def _opset(graph: Graph) -> Found:
    last = graph.profile.last_opset
    if last is not None and graph.opset > last:
        yield graph.nodes[0], f'opset {graph.opset}; {graph.profile.title} ends at {last}', ''


@rule(
    'Q41',
    'numbers that the engine has no layers for',
    'TensorRT has INT4 for weights only, and of FP8 E4M3 (FLOAT8E4M3FN) only, from TensorRT 10 and '
    'compute capability 8.9 on',
    'quantize to int8, or to E4M3 for an engine that has it',
)
def _other_kind(graph: Graph) -> Found:
    for pair in all_pairs(graph):
        for case, kinds in _OTHERS.items():
            if pair.kind in kinds:
                alone = case == 'INT4' and pair.q is None and graph.holds_weight(pair)
                yield pair.dq, pair.kind, 'INT4 weight only' if alone else case


@rule(
    'Q43',
    'INT8 and FP8 in one operator',
    'no kernel multiplies or joins the two',
    'give input and weight, and all inputs of a concat, one number format',
)
def _mixed(graph: Graph) -> Found:
    for node in graph.layers():
        weight = graph.weight_pair(node)
        kinds = {p.kind for p in (*graph.read_pairs(node), *([weight] if weight else ()))}
        if FP8 in kinds and len(kinds) > 1:
            yield node, ' and '.join(sorted(kinds)), 'layer'
    for node in graph.of('Concat'):
        pairs = [graph.pair(tensor) for tensor in node.input]
        kinds = {pair.kind for pair in pairs if pair is not None}
        if FP8 in kinds and len(kinds) > 1:
            yield node, ' and '.join(sorted(kinds)), 'concat'


@rule(
    'Q44',
    'FP8 in an opset that has none',
    'ONNX has it from opset 19 on; tools that check a file refuse it',
    'export with opset 19 or later',
)
def _early(graph: Graph) -> Found:
    if graph.opset < FIRST_FP8:
        for pair in all_pairs(graph):
            if pair.kind == FP8:
                yield pair.dq, f'opset {graph.opset}', ''


@rule(
    'Q42',
    'operator that computes with integers',
    'TensorRT and its compiler know Q and DQ only',
    'quantize with Q and DQ around float operators (QuantFormat.QDQ), with fixed ranges',
    floats=True,
)
def _integer_operator(graph: Graph) -> Found:
    for node in graph.of(*INTEGER_OPS, *DYNAMIC_OPS):
        case = 'while it runs' if node.op_type in DYNAMIC_OPS else 'in the operator'
        yield node, node.op_type, case
