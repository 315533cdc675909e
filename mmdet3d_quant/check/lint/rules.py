"""The rules of TensorRT's explicit quantization: data, with one small function each.

They follow NVIDIA's TensorRT documentation ("Working with Quantized Types": explicit quantization,
Q/DQ placement, Q/DQ limitations) and what its layers can fuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, Tuple

import numpy as np
from onnx import NodeProto

from mmdet3d_quant.check.lint.graph import LAYERS, Graph, Pair, axis_of
from mmdet3d_quant.core.spec import MIN_AMAX

#: Where, and what exactly.
Found = Iterator[Tuple[NodeProto, str]]
#: Ops that only pass or rearrange values; before a convolution they keep its DQ from it.
PASSING = (
    'Cast', 'Clip', 'Flatten', 'Identity', 'LeakyRelu', 'Mul', 'Pad', 'Relu', 'Reshape', 'Sigmoid',
    'Slice', 'Squeeze', 'Transpose', 'Unsqueeze',
)  # yapf: disable  # fmt: skip
#: The scale of a tensor that was all zeros while calibrating.
DEAD = MIN_AMAX / 127
HUGE = 1e4


@dataclass(frozen=True)
class Rule:
    """One thing that goes wrong.

    Attributes:
        id: For ``--ignore`` and for looking up.
        title: What is wrong.
        why: What it costs.
        mend: What to do.
        check: Finds it.
    """

    id: str
    title: str
    why: str
    mend: str
    check: Callable[[Graph], Found]


@dataclass(frozen=True)
class Finding:
    """A rule that a node breaks.

    Attributes:
        rule: The rule.
        node: Name of the node.
        detail: Numbers and names.
    """

    rule: Rule
    node: str
    detail: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        r = self.rule
        return dict(
            id=r.id, node=self.node, title=r.title, detail=self.detail, why=r.why, mend=r.mend
        )


RULES: list[Rule] = []


def lint(graph: Graph, ignore: Iterable[str] = ()) -> list[Finding]:
    """Checks a graph against all rules.

    Args:
        graph: The graph.
        ignore: Ids of rules to leave out.

    Returns:
        Findings by rule, then in the order of the file; none for a graph without any Q/DQ, which
        is a float graph and may well be meant as one.

    Raises:
        ValueError: If an id is unknown.
    """
    ignored = set(ignore)
    unknown = ignored - {rule.id for rule in RULES}
    if unknown:
        raise ValueError(f'there is no rule {sorted(unknown)[0]}')
    if not is_quantized(graph):
        return []
    return [
        Finding(rule, graph.name(node), detail)
        for rule in RULES
        if rule.id not in ignored
        for node, detail in rule.check(graph)
    ]


def is_quantized(graph: Graph) -> bool:
    """Whether there is any Q or DQ."""
    return any(True for _ in graph.of('QuantizeLinear', 'DequantizeLinear'))


def rule(id: str, title: str, why: str, mend: str) -> Callable:
    """Registers a check as a rule."""

    def register(check: Callable[[Graph], Found]) -> Callable[[Graph], Found]:
        RULES.append(Rule(id, title, why, mend, check))
        return check

    return register


# Convolutions


@rule(
    'Q01',
    'batch norm left behind a convolution',
    'it runs in float between two INT8 layers, or keeps the convolution from INT8',
    'fold it into the convolution before exporting',
)
def _batch_norm(graph: Graph) -> Found:
    for node in graph.of('BatchNormalization'):
        before = graph.producer.get(node.input[0])
        if before is not None and before.op_type in LAYERS:
            yield node, f'behind {graph.name(before)}'


@rule(
    'Q02',
    'input of a convolution is not quantized',
    'with only its weight quantized, the convolution runs in float',
    'put Q/DQ on its input',
)
def _input(graph: Graph) -> Found:
    for node in graph.of(*LAYERS):
        open_ = graph.pair(node.input[0]) is None and not _behind_passing(graph, node.input[0])
        if open_ and graph.weight_pair(node) is not None:
            yield node, f'reads {node.input[0]}'


@rule(
    'Q03',
    'weight of a convolution is not quantized',
    'with only its input quantized, the convolution runs in float',
    'put Q/DQ on its weight, per output channel',
)
def _weight(graph: Graph) -> Found:
    for node in graph.of(*LAYERS):
        open_ = graph.weight_pair(node) is None and not _behind_passing(graph, node.input[1])
        if open_ and graph.pair(node.input[0]) is not None:
            yield node, f'weight {node.input[1]}'


@rule(
    'Q04',
    'float convolution between INT8 layers',
    'its input is converted from and its output to INT8: two reformats besides the slow layer',
    'quantize it, or keep everything up to the next end of the graph float',
)
def _island(graph: Graph) -> Found:
    before, behind = _reached(graph, forward=True), _reached(graph, forward=False)
    for node in graph.of(*LAYERS):
        plain = graph.pair(node.input[0]) is None and graph.weight_pair(node) is None
        plain = plain and not any(_behind_passing(graph, t) for t in node.input[:2])
        if plain and id(node) in before and id(node) in behind:
            yield node, 'INT8 before and behind it: 2 reformats'


@rule(
    'Q05',
    'something between DQ and convolution',
    'an engine fuses a DQ only with the layer that reads it',
    'move Q/DQ to directly before the convolution',
)
def _blocked(graph: Graph) -> Found:
    for node in graph.of(*LAYERS):
        for tensor, what in zip(node.input[:2], ('input', 'weight')):
            between = _behind_passing(graph, tensor)
            if between is not None:
                yield node, f'{graph.name(between)} ({between.op_type}) on its {what}'


@rule(
    'Q06',
    'Q/DQ between a convolution and its activation',
    'convolution and activation are no longer one kernel',
    'quantize behind the activation',
)
def _before_activation(graph: Graph) -> Found:
    for node in graph.of('Relu', 'Clip', 'LeakyRelu'):
        pair = graph.pair(node.input[0])
        if pair is None or pair.q is None:
            continue
        before = graph.producer.get(pair.source)
        if before is not None and before.op_type in (*LAYERS, 'Add', 'BatchNormalization'):
            yield pair.q, f'between {graph.name(before)} and {graph.name(node)}'


@rule(
    'Q07',
    'Q/DQ on a bias',
    'biases are added in INT32 or float; TensorRT refuses or ignores their Q/DQ',
    'leave the bias float',
)
def _bias(graph: Graph) -> Found:
    for node in graph.of(*LAYERS, 'Gemm'):
        if len(node.input) > 2 and graph.pair(node.input[2]) is not None:
            yield node, f'bias {node.input[2]}'


# Where tensors meet


@rule(
    'Q10',
    'add of tensors with different scales',
    'one of them is converted first',
    'give both one scale (tie their quantizers)',
)
def _add_scales(graph: Graph) -> Found:
    for node in graph.of('Add', 'Sum'):
        yield from _unequal(graph, node)


@rule(
    'Q11',
    'residual add without Q/DQ on a branch',
    'the other branch stays float in memory, and the add is not fused into the convolution',
    'quantize the identity branch, with the scale of the block input',
)
def _residual(graph: Graph) -> Found:
    for node in graph.of('Add', 'Sum'):
        if any(graph.is_constant(t) or graph.pair(t) is not None for t in node.input):
            continue
        makers = [_maker(graph, t) for t in node.input]
        int8 = [m for m in makers if m is not None and m.op_type in LAYERS and _is_int8(graph, m)]
        if int8:
            yield node, f'adds to {graph.name(int8[0])}'


@rule(
    'Q12',
    'concat of tensors with different scales',
    'inputs are converted before they are joined',
    'give all inputs one scale (tie their quantizers)',
)
def _concat_scales(graph: Graph) -> Found:
    for node in graph.of('Concat'):
        yield from _unequal(graph, node)


@rule(
    'Q13',
    'concat of quantized and float tensors',
    'the concat runs in float',
    'quantize all of its inputs, with one scale',
)
def _concat_mixed(graph: Graph) -> Found:
    for node in graph.of('Concat'):
        open_ = [t for t in node.input if graph.pair(t) is None and not graph.is_constant(t)]
        if open_ and any(graph.pair(t) is not None for t in node.input):
            yield node, f'{len(open_)} of {len(node.input)} inputs float, for example {open_[0]}'


@rule(
    'Q14',
    'one tensor quantized with several scales',
    'it is kept, and converted, once per scale',
    'give all of its readers one scale (tie their quantizers)',
)
def _several_scales(graph: Graph) -> Found:
    for tensor, readers in graph.readers.items():
        quantize = [n for n, i in readers if n.op_type == 'QuantizeLinear' and i == 0]
        scales = [graph.grid(n)[0] for n in quantize]
        known = [s for s in scales if s is not None]
        if any(not np.array_equal(s, known[0]) for s in known[1:]):
            values = ', '.join(f'{s.flat[0]:.4g}' for s in known)
            yield quantize[0], f'{tensor}: scales {values}'


@rule(
    'Q15',
    'dequantized and quantized again',
    'rounds twice, and adds a conversion if the scales differ',
    'keep one of the two pairs',
)
def _double(graph: Graph) -> Found:
    for node in graph.of('QuantizeLinear'):
        pair = graph.pair(node.input[0])
        if pair is not None:
            yield node, f'behind {graph.name(pair.dq)}'


# The grid


def _grids(graph: Graph) -> Iterator[tuple[NodeProto, np.ndarray | None, np.ndarray | None]]:
    for node in graph.of('QuantizeLinear', 'DequantizeLinear'):
        yield node, *graph.grid(node)


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
    for node, scale, _ in _grids(graph):
        if scale is not None and not np.isfinite(scale).all():
            yield node, f'{(~np.isfinite(scale)).sum()} of {scale.size} scales'


@rule(
    'Q23',
    'scale is 0 or negative',
    'divides by zero, or turns signs round; TensorRT refuses it',
    'keep ranges above zero',
)
def _not_positive(graph: Graph) -> Found:
    for node, scale, _ in _grids(graph):
        if scale is not None and (scale <= 0).any():
            yield node, f'scale {scale[scale <= 0][0]:g}'


@rule(
    'Q24',
    'scale is next to 0',
    'its reciprocal overflows, or the scale does when it is stored in FP16',
    f'keep ranges at {MIN_AMAX:.2g} or more',
)
def _tiny(graph: Graph) -> Found:
    for node, scale, _ in _grids(graph):
        small = scale is not None and scale[(scale > 0) & (scale < 0.99 * DEAD)]
        if scale is not None and len(small):
            yield node, f'scale {small[0]:.3g}'


@rule(
    'Q25',
    'scale is huge',
    'ordinary values all become 0',
    'look for an outlier in the calibration data',
)
def _huge(graph: Graph) -> Found:
    for node, scale, _ in _grids(graph):
        large = scale is not None and scale[np.isfinite(scale) & (scale > HUGE)]
        if scale is not None and len(large):
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
    'Q27',
    'scale is not constant',
    'engines need scales when they are built',
    'export with fixed ranges',
)
def _not_constant(graph: Graph) -> Found:
    for node, scale, _ in _grids(graph):
        if scale is None:
            yield node, f'scale {node.input[1]} is computed'


@rule(
    'Q28',
    'weight scales along the wrong axis',
    'TensorRT takes the output channels only: axis 0 of Conv, axis 1 of ConvTranspose',
    'export with the axis of the output channels',
)
def _axis(graph: Graph) -> Found:
    for node in graph.of(*LAYERS):
        pair = graph.weight_pair(node)
        if pair is None or pair.scale is None or pair.scale.size == 1:
            continue
        if pair.axis != LAYERS[node.op_type]:
            yield node, f'axis {pair.axis} of {node.op_type}'


@rule(
    'Q29',
    'as many scales as there are no channels',
    'the file is broken; engines refuse it',
    'one scale per output channel',
)
def _count(graph: Graph) -> Found:
    for node in graph.of(*LAYERS):
        pair = graph.weight_pair(node)
        shape = graph.shapes.get(pair.source) if pair else None
        if not pair or pair.scale is None or pair.scale.size == 1 or not shape:
            continue
        if not -len(shape) <= pair.axis < len(shape) or shape[pair.axis] != pair.scale.size:
            yield node, f'{pair.scale.size} scales for a weight of shape {shape}'


@rule(
    'Q30',
    'activation with scales per channel',
    'TensorRT takes one scale per activation tensor',
    'calibrate activations per tensor',
)
def _per_channel(graph: Graph) -> Found:
    for pair in _pairs(graph):
        many = pair.scale is not None and pair.scale.size > 1
        if many and not graph.holds_weight(pair):
            yield pair.dq, f'{pair.scale.size} scales' if pair.scale is not None else ''


@rule(
    'Q31',
    'Q and DQ disagree',
    'values come back scaled',
    'give both one scale, zero point and axis',
)
def _disagree(graph: Graph) -> Found:
    for pair in _pairs(graph):
        if pair.q is None:
            continue
        scale, zero = graph.grid(pair.q)
        same = _same(scale, pair.scale) and _same(zero, pair.zero)
        per_channel = scale is not None and scale.size > 1
        if not same or (per_channel and axis_of(pair.q) != pair.axis):
            yield pair.dq, f'and {graph.name(pair.q)}'


@rule(
    'Q32',
    'Q without DQ',
    'integers leave the quantized world, and the next layer takes them for real values',
    'let a DequantizeLinear read them',
)
def _lonely(graph: Graph) -> Found:
    for node in graph.of('QuantizeLinear'):
        readers = [n.op_type for n, _ in graph.readers[node.output[0]]]
        if node.output[0] in graph.outputs:
            yield node, 'is an output of the graph'
        elif not readers or set(readers) != {'DequantizeLinear'}:
            yield node, f'read by {", ".join(readers) or "nobody"}'


# How the rules look


def _pairs(graph: Graph) -> Iterator[Pair]:
    for node in graph.of('DequantizeLinear'):
        pair = graph.pair(node.output[0])
        if pair is not None:
            yield pair


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b, equal_nan=a.dtype.kind == 'f')


def _maker(graph: Graph, tensor: str) -> NodeProto | None:
    """The op that makes a tensor, a batch norm that should have been folded left out."""
    node = graph.producer.get(tensor)
    if node is not None and node.op_type == 'BatchNormalization':
        return graph.producer.get(node.input[0])
    return node


def _is_int8(graph: Graph, layer: NodeProto) -> bool:
    return graph.pair(layer.input[0]) is not None and graph.weight_pair(layer) is not None


def _behind_passing(graph: Graph, tensor: str) -> NodeProto | None:
    """The op that makes a tensor, if it only passes on what a DQ made."""
    node = graph.producer.get(tensor)
    if node is None or node.op_type not in PASSING:
        return None
    return node if any(graph.pair(t) is not None for t in node.input) else None


def _unequal(graph: Graph, node: NodeProto) -> Found:
    scales = [p.scale for p in map(graph.pair, node.input) if p is not None and p.scale is not None]
    if any(not _same(s, scales[0]) for s in scales[1:]):
        yield node, 'scales ' + ', '.join(f'{s.flat[0]:.4g}' for s in scales)


def _reached(graph: Graph, forward: bool) -> set[int]:
    """Nodes that an INT8 convolution leads to, or that lead to one."""
    found: set[int] = set()
    for node in graph.nodes if forward else reversed(graph.nodes):
        if forward:
            near = [graph.producer.get(t) for t in node.input]
        else:
            near = [n for t in node.output for n, _ in graph.readers[t]]
        near = [n for n in near if n is not None]
        if any(id(n) in found or (n.op_type in LAYERS and _is_int8(graph, n)) for n in near):
            found.add(id(node))
    return found
