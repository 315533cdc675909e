"""Rules of tensors that meet: adds, concats, several readers, one rounding behind another."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from mmdet3d_quant.check.lint.graph import Graph
from mmdet3d_quant.check.lint.rules.helpers import same_values
from mmdet3d_quant.check.lint.rules.registry import Found, rule


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
        # What something else reads, too, as a layer norm beside the add, is kept in float anyway.
        alone = [t for t in node.input if len(graph.readers.get(t, ())) == 1]
        makers = [_maker(graph, t) for t in alone]
        int8 = [m for m in makers if m is not None and graph.is_layer(m) and graph.is_int8(m)]
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


def _maker(graph: Graph, tensor: str) -> NodeProto | None:
    """The op that makes a tensor, a batch norm that should have been folded left out."""
    node = graph.producer.get(tensor)
    if node is not None and node.op_type == 'BatchNormalization':
        return graph.producer.get(node.input[0])
    return node


def _unequal(graph: Graph, node: NodeProto) -> Found:
    scales = [p.scale for p in map(graph.pair, node.input) if p is not None and p.scale is not None]
    if any(not same_values(s, scales[0]) for s in scales[1:]):
        yield node, 'scales ' + ', '.join(f'{s.flat[0]:.4g}' for s in scales)
