"""Small graphs with one defect each, and as many without it that look nearly the same.

A case is a function of a graph and of whether it shall be wrong; it returns the output's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import numpy as np
from onnx import TensorProto, helper

from tests.engines.qdq import QDQ

ZERO = np.int8(0)


@dataclass(frozen=True)
class Planted:
    """A case.

    Attributes:
        rule: Id of the rule that finds it.
        case: Case of the rule, as ``rules/effects.py`` calls it.
        build: Makes the graph.
        opset: Of the graph; 0 takes that of the builder.
        twin: Whether the clean graph computes as much, so that costs may be compared.
        also: Rules that both graphs break, for NVIDIA's compiler.
        typed: Whether the graph is typed FP16, as often as it is planted.
    """

    rule: str
    case: str
    build: Callable[[QDQ, bool], str]
    opset: int = 0
    twin: bool = True
    also: tuple = ()
    typed: tuple = (False, True)


PLANTED: dict[str, Planted] = {}


def planted(name: str, rule: str, case: str = '', **options) -> Callable:
    def register(build: Callable) -> Callable:
        assert name not in PLANTED
        PLANTED[name] = Planted(rule, case, build, **options)
        return build

    return register


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def weight(g: QDQ, *shape: int, axis: int | None = 0, scale=None) -> str:
    """A quantized weight, with a scale for each of the channels on ``axis``."""
    shape = shape or (g.channels, g.channels, 3, 3)
    scale = [0.01] * shape[axis] if scale is None else scale
    return g.qdq(g.weight(*shape), scale, axis=axis)


def conv(g: QDQ, x: str, w: str, *rest: str, name: str = 'conv') -> str:
    return g.node('Conv', x, w, *rest, name=name, pads=[1] * 4)


def start(g: QDQ, name: str = 'first') -> str:
    """A convolution and its activation, before what a case is about."""
    return g.node('Relu', g.conv('x', name))


def rows(g: QDQ, x: str = 'x') -> str:
    """The input as a matrix of as many columns as there are channels."""
    return g.node(
        'Reshape', g.node('Transpose', x, perm=[0, 2, 3, 1]), g.constant(ints(-1, g.channels))
    )


# Layers


@planted('batch norm', 'Q01')
def _batch_norm(g, wrong):
    y = g.conv('x', 'first')
    if wrong:
        ones = [g.constant(np.ones(g.channels, g.real)) for _ in range(4)]
        y = g.node('BatchNormalization', y, *ones)
    return g.conv(g.node('Relu', y), 'second')


@planted('input float', 'Q02')
def _input(g, wrong):
    y = start(g)
    return conv(g, y if wrong else g.qdq(y), weight(g))


@planted('input float, product', 'Q02')
def _input_of_product(g, wrong):
    y = rows(g)
    return g.node('MatMul', y if wrong else g.qdq(y), weight(g, g.channels, 16, axis=1))


@planted('weight float', 'Q03')
def _weight(g, wrong):
    w = g.weight(g.channels, g.channels, 3, 3) if wrong else weight(g)
    return conv(g, g.qdq(start(g)), w)


@planted('weight float, product', 'Q03')
def _weight_of_product(g, wrong):
    w = g.weight(g.channels, 16) if wrong else weight(g, g.channels, 16, axis=1)
    return g.node('Gemm', g.qdq(rows(g)), w)


@planted('float island', 'Q04')
def _island(g, wrong):
    return g.conv(g.conv(start(g), 'island', quantized=not wrong), 'last')


def _between(what, kind, *extra, clean='Transpose', options=None, **attributes):
    """Arithmetic between DQ and layer; the clean graph only moves values there."""
    options = dict(perm=[0, 1, 3, 2]) if options is None else options

    @planted(f'{kind} on the {what}', 'Q05', what, twin=False)
    def build(g, wrong):
        factors = [g.qdq(start(g)), weight(g)]
        which = ('input', 'weight').index(what)
        if wrong:
            more = [g.constant(e(g)) for e in extra]
            factors[which] = g.node(kind, factors[which], *more, **attributes)
        else:
            factors[which] = g.node(clean, factors[which], **options)
        return conv(g, *factors)


_between('input', 'Relu')
_between('weight', 'Relu')
_between('input', 'Sigmoid', clean='Identity', options={})
_between('input', 'LeakyRelu', clean='Neg', options={}, alpha=0.1)
_between('input', 'Clip', lambda g: g.real(0), lambda g: g.real(6))
_between('input', 'Add', lambda g: g.real(0.5))
_between('input', 'Mul', lambda g: np.full((1, g.channels, 1, 1), 0.5, g.real))
_between(
    'input', 'AveragePool', clean='MaxPool', options=dict(kernel_shape=[2, 2], strides=[2, 2]),
    kernel_shape=[2, 2], strides=[2, 2],
)  # fmt: skip


@planted('zeros around a map, moved', 'Q05', 'input', twin=False)
def _padded(g, wrong):
    pads = g.constant(ints(0, 0, 1, 1, 0, 0, 1, 1))
    y = g.node('Pad', g.qdq(start(g)), pads)
    if wrong:  # directly before a convolution they are part of it
        y = g.node('Transpose', y, perm=[0, 1, 3, 2])
    return conv(g, y, weight(g))


@planted('ones around a map', 'Q05', 'input')
def _padded_with_ones(g, wrong):
    pads = g.constant(ints(0, 0, 1, 1, 0, 0, 1, 1))
    y = g.node('Pad', g.qdq(start(g)), pads, g.constant(g.real(1 if wrong else 0)))
    return conv(g, y, weight(g))


@planted('zeros before a product', 'Q05', 'input', twin=False)
def _padded_product(g, wrong):
    options = {} if wrong else dict(mode='edge')
    y = g.node('Pad', g.qdq(start(g)), g.constant(ints(0, 0, 1, 1, 0, 0, 1, 1)), **options)
    return g.node('MatMul', rows(g, y), weight(g, g.channels, 16, axis=1))


@planted('Resize input', 'Q05', 'input', twin=False)
def _resize(g, wrong):
    y = g.qdq(start(g))
    if wrong:
        scales = g.constant(np.array([1, 1, 2, 2], np.float32))
        y = g.node(
            'Resize', y, '', scales, mode='nearest', coordinate_transformation_mode='asymmetric'
        )
    else:
        y = g.node('Tile', y, g.constant(ints(1, 1, 2, 2)))
    return conv(g, y, weight(g))


@planted('before the activation', 'Q06')
def _before_activation(g, wrong):
    y = g.conv('x', 'first')
    y = g.node('Relu', g.qdq(y) if wrong else y)
    return g.conv(y, 'second')


def _bias(name, case, axis):
    """Q/DQ on a bias, beside a weight with scales on an axis, or with one."""

    @planted(name, 'Q07', case)
    def build(g, wrong):
        b = g.weight(g.channels)
        w = weight(g, axis=axis, scale=0.01 if axis is None else None)
        y = conv(g, g.qdq('x'), w, g.qdq(b, 0.01) if wrong else b)
        return g.conv(g.node('Relu', y), 'second')


_bias('bias with Q/DQ', 'Q/DQ', 0)
_bias('bias with Q/DQ, one scale', 'Q/DQ, one weight scale', None)


@planted('bias in integers', 'Q07', 'integers')
def _int32(g, wrong):
    b = g.weight(g.channels)
    if wrong:
        c = g.channels
        stored, scale = g.constant(np.ones(c, np.int32)), g.constant(np.full(c, 0.001, g.real))
        b = g.node('DequantizeLinear', stored, scale, g.constant(np.zeros(c, np.int32)), axis=0)
    return conv(g, g.qdq('x'), weight(g), b)


@planted('transposed convolution', 'Q36', twin=False)
def _transposed(g, wrong):
    c, x = g.channels, g.qdq('x')
    if wrong:
        return g.node('ConvTranspose', x, weight(g, c, c, 2, 2, axis=1), strides=[2, 2])
    return g.node('DepthToSpace', g.node('Conv', x, weight(g, 4 * c, c, 1, 1)), blocksize=2)


# Joins


def _residual(g, left, right):
    y = start(g)
    body = g.conv(y, 'body')
    return g.conv(g.node('Relu', g.node('Add', left(g, body), right(g, y))), 'last')


def _as_it_is(g, x):
    return x


@planted('add scales', 'Q10')
def _add_scales(g, wrong):
    return _residual(g, lambda g, x: g.qdq(x, 0.2 if wrong else 0.1), QDQ.qdq)


@planted('identity float', 'Q11')
def _identity(g, wrong):
    return _residual(g, _as_it_is, _as_it_is if wrong else QDQ.qdq)


def _concat(g, first, second, behind):
    y = g.node('Concat', first(start(g)), second(start(g, 'other')), axis=1)
    return conv(g, behind(y), weight(g, g.channels, 2 * g.channels, 3, 3))


@planted('concat scales', 'Q12', 'a layer reads it')
def _concat_scales(g, wrong):
    return _concat(g, g.qdq, lambda x: g.qdq(x, 0.2 if wrong else 0.1), lambda y: y)


@planted('concat scales and Q', 'Q12', 'no layer reads it')
def _concat_scales_q(g, wrong):
    return _concat(g, g.qdq, lambda x: g.qdq(x, 0.2 if wrong else 0.1), g.qdq)


@planted('concat mixed', 'Q13', 'a layer reads it')
def _concat_mixed(g, wrong):
    return _concat(g, g.qdq, (lambda x: x) if wrong else g.qdq, lambda y: y)


@planted('concat mixed and Q', 'Q13', 'no layer reads it')
def _concat_mixed_q(g, wrong):
    return _concat(g, g.qdq, (lambda x: x) if wrong else g.qdq, g.qdq)


@planted('two scales of a tensor', 'Q14')
def _several(g, wrong):
    y = start(g)
    a, b = g.conv(y, 'one'), g.conv(y, 'two', scale=0.2 if wrong else 0.1)
    return g.node('Concat', a, b, axis=1)


@planted('double', 'Q15')
def _double(g, wrong):
    y = start(g)
    return g.conv(g.qdq(y) if wrong else y, 'second')


@planted('double, other scale', 'Q15')
def _double_other(g, wrong):
    y = start(g)
    return g.conv(g.qdq(y, 0.2) if wrong else y, 'second')


# Values of scales and zero points


def pair(g, x, scale, zero=ZERO, attributes=None, dq_scale=None, dq_zero=None, axes=None):
    """A Q and a DQ of which everything may be said; ``None`` as zero point leaves it out."""
    axes = axes or {}
    z = [] if zero is None else [g.constant(zero)]
    dz = z if dq_zero is None else [g.constant(dq_zero)]
    q = g.node('QuantizeLinear', x, scale, *z, **(attributes or {}), **axes)
    return g.node('DequantizeLinear', q, dq_scale or scale, *dz, **axes)


def _activation(
    name, rule, case='', *, scale=0.1, good=0.1, opset=0, typed=(False, True), **options
):
    """A convolution whose input has a pair of the given kind."""

    @planted(name, rule, case, opset=opset, typed=typed)
    def build(g, wrong):
        value = g.constant(np.asarray(scale if wrong else good, g.real))
        return conv(g, pair(g, start(g), value, **(options if wrong else {})), weight(g))


def _weights(name, rule, case='', *, one, typed=(False, True)):
    """A convolution with one weight channel whose scale has the given value."""

    @planted(name, rule, case, typed=typed)
    def build(g, wrong):
        scale = [0.01] * g.channels
        scale[0] = one if wrong else 0.02
        return conv(g, g.qdq(start(g)), weight(g, scale=scale))


_activation('zero point', 'Q20', 'integers', zero=np.int8(3))
_activation('zero point UINT8', 'Q20', 'integers', zero=np.uint8(3))
_activation('UINT8', 'Q21', 'UINT8', zero=np.uint8(0))
_activation('no zero point', 'Q21', 'no zero point', zero=None)
_activation(
    'UINT8 by attribute', 'Q21', 'output_dtype', zero=None, opset=21,
    attributes=dict(output_dtype=TensorProto.UINT8),
)  # fmt: skip


@planted('UINT8 weight', 'Q21', 'weight')
def _unsigned_weight(g, wrong):
    zero = np.zeros(g.channels, np.uint8 if wrong else np.int8)
    scale = g.constant(np.full(g.channels, 0.01, g.real))
    w = g.weight(g.channels, g.channels, 3, 3)
    return conv(g, g.qdq(start(g)), pair(g, w, scale, zero=zero, axes=dict(axis=0)))


@planted('stored UINT8', 'Q21', 'stored')
def _stored_unsigned(g, wrong):
    c = g.channels
    values = np.ones((c, c, 3, 3), np.uint8 if wrong else np.int8)
    scale = g.constant(np.full(c, 0.01, g.real))
    zero = g.constant(np.zeros(c, values.dtype))
    w = g.node('DequantizeLinear', g.constant(values), scale, zero, axis=0)
    return conv(g, g.qdq(start(g)), w)


_activation('NaN scale', 'Q22', 'NaN', scale=np.nan)
_weights('NaN weight scale', 'Q22', 'NaN', one=np.nan)
_activation('infinite scale', 'Q22', 'infinite', scale=np.inf)
_weights('infinite weight scale', 'Q22', 'infinite', one=np.inf)
_activation('scale 0', 'Q23', scale=0)
_weights('weight scale 0', 'Q23', one=0)
_activation('negative scale', 'Q23', scale=-0.1)
_weights('negative weight scale', 'Q23', one=-0.1)
# In a graph typed FP16 such scales are 0, which is Q23.
_activation('scale 0 in FP16', 'Q24', scale=2.0**-25, typed=(False,))
_weights('weight scale 0 in FP16', 'Q24', one=1e-9, typed=(False,))
_activation('huge scale', 'Q25', scale=2e4)
_weights('huge weight scale', 'Q25', one=2e4)
_activation('dead range', 'Q26', scale=2.0**-24 / 127, typed=(False,))


@planted('scale from constants', 'Q27', 'constants')
def _from_constants(g, wrong):
    scale = g.constant(g.real(0.1))
    if wrong:
        scale = g.node('Div', g.constant(g.real(12.7)), g.constant(g.real(127)))
    return conv(g, pair(g, start(g), scale), weight(g))


@planted('scale from data', 'Q27', 'data')
def _from_data(g, wrong):
    y = start(g)
    scale = g.constant(g.real(0.1))
    if wrong:
        scale = g.node('ReduceMax', g.node('Abs', y), keepdims=0)
    return conv(g, pair(g, y, scale), weight(g))


@planted('NaN weight', 'Q33')
def _nan_weight(g, wrong):
    value = np.full((g.channels, g.channels, 3, 3), 0.1, g.real)
    value.flat[0] = np.nan if wrong else 0
    w = g.qdq(g.constant(value), [0.01] * g.channels, axis=0)
    return conv(g, g.qdq(start(g)), w)


@planted('bias beyond INT32', 'Q34')
def _long_bias(g, wrong):
    # 2**31 steps of input times weight scale, and half of them.
    scale = 2e-6 if wrong else 1e-5
    b = g.constant(np.full(g.channels, 3e4 if wrong else 1e3, g.real))
    w = weight(g, scale=[scale] * g.channels)
    return conv(g, g.qdq(start(g), 2e-6 if wrong else 0.1), w, b)


# Channels


@planted('conv axis', 'Q28', 'Conv')
def _axis(g, wrong):
    return conv(g, g.qdq(start(g)), weight(g, axis=1 if wrong else 0))


@planted('conv axis behind Transpose', 'Q28', 'Conv')
def _axis_moved(g, wrong):
    w = g.node('Transpose', weight(g, axis=0 if wrong else 1), perm=[1, 0, 2, 3])
    return conv(g, g.qdq(start(g)), w)


@planted('axis from the end', 'Q28', 'Conv')
def _axis_negative(g, wrong):
    w = g.qdq(g.weight(g.channels, g.channels, 3, 3), [0.01] * g.channels, axis=-3 if wrong else -4)
    return conv(g, g.qdq(start(g)), w)


@planted('matmul axis', 'Q28', 'product')
def _axis_of_product(g, wrong):
    shape = g.channels, 2 * g.channels
    return g.node('MatMul', g.qdq(rows(g)), weight(g, *shape, axis=0 if wrong else 1))


@planted('gemm axis', 'Q28', 'product')
def _axis_of_gemm(g, wrong):
    w = weight(g, 2 * g.channels, g.channels, axis=1 if wrong else 0)
    return g.node('Gemm', g.qdq(rows(g)), w, transB=1)


@planted('deconv axis', 'Q28', 'ConvTranspose', also=('Q36',))
def _axis_of_deconv(g, wrong):
    c = g.channels
    w = weight(g, c, c, 3, 3, axis=0 if wrong else 1)
    return g.node('ConvTranspose', g.qdq('x'), w, strides=[2, 2])


@planted('number of scales', 'Q29', 'number')
def _count(g, wrong):
    c = g.channels
    w = g.qdq(g.weight(c, c, 3, 3), [0.01] * (c - 1 if wrong else c), axis=0)
    return conv(g, g.qdq(start(g)), w)


@planted('scales in four dimensions', 'Q29', 'dimensions')
def _four_dimensions(g, wrong):
    c = g.channels
    scale = np.full((c, 1, 1, 1) if wrong else c, 0.01)
    return conv(g, g.qdq(start(g)), g.qdq(g.weight(c, c, 3, 3), scale, axis=0))


@planted('activation per channel', 'Q30')
def _per_channel(g, wrong):
    scale, axis = ([0.1] * g.channels, 1) if wrong else (0.1, None)
    return conv(g, g.qdq(start(g), scale, axis=axis), weight(g))


@planted('activation scale of one dimension', 'Q38', 'activation of a convolution')
def _one_dimension(g, wrong):
    return conv(g, g.qdq(start(g), [0.1] if wrong else 0.1), weight(g))


@planted('weight scale of one dimension', 'Q38', 'elsewhere', typed=(False,))
def _weight_of_one_dimension(g, wrong):
    w = g.qdq(g.weight(g.channels, g.channels, 3, 3), [0.01] if wrong else 0.01)
    return conv(g, g.qdq(start(g)), w)


@planted('FP16 weight scale of one dimension', 'Q38', 'FP16 weight of a convolution', typed=(True,))
def _half_weight_of_one_dimension(g, wrong):
    return _weight_of_one_dimension(g, wrong)


@planted('scale of one dimension, product', 'Q38', 'elsewhere')
def _one_dimension_of_product(g, wrong):
    x = g.qdq(rows(g), [0.1] if wrong else 0.1)
    return g.node('Gemm', x, weight(g, g.channels, 16, axis=1))


# Pairs


@planted('Q and DQ disagree', 'Q31')
def _disagree(g, wrong):
    one, two = g.constant(g.real(0.1)), g.constant(g.real(0.2))
    return conv(g, pair(g, start(g), one, dq_scale=two if wrong else one), weight(g))


@planted('layer reads integers', 'Q32', 'read as numbers', twin=False)
def _no_dq(g, wrong):
    scale, zero = g.constant(g.real(0.1)), g.constant(ZERO)
    y = g.node('QuantizeLinear', start(g), scale, zero)
    y = g.node('Transpose', y, perm=[0, 1, 3, 2])  # between the two it is no defect
    return conv(g, y if wrong else g.node('DequantizeLinear', y, scale, zero), weight(g))


@planted('Q that nobody reads', 'Q32', 'read by nobody')
def _unread(g, wrong):
    y = start(g)
    if wrong:
        g.node('QuantizeLinear', y, g.constant(g.real(0.1)), g.constant(ZERO))
    return g.conv(y, 'second')


@planted('zero points', 'Q37')
def _zero_points(g, wrong):
    scale = g.constant(np.full(g.channels, 0.01, g.real))
    zero = np.zeros(1 if wrong else g.channels, np.int8)
    w = pair(g, g.weight(g.channels, g.channels, 3, 3), scale, zero=zero, axes=dict(axis=0))
    return conv(g, g.qdq(start(g)), w)


@planted('scale of another type', 'Q39', 'other than its tensor')
def _other_type(g, wrong):
    other = np.float32 if g.half else np.float16
    scale = g.constant((other if wrong else g.real)(0.1))
    return conv(g, pair(g, start(g), scale), weight(g))


_activation('INT16', 'Q41', 'INT16', zero=np.int16(0), opset=21)


@planted('INT4', 'Q41', 'INT4', opset=21)
def _int4(g, wrong):
    g.dtype = TensorProto.INT4 if wrong else TensorProto.INT8
    return g.conv('x', 'conv')


def fp8(g, wrong):
    """E4M3 and, where it shall be wrong, something else."""
    g.dtype = TensorProto.INT8 if wrong else TensorProto.FLOAT8E4M3FN


@planted('E5M2', 'Q41', 'other FP8', opset=19)
def _e5m2(g, wrong):
    g.dtype = TensorProto.FLOAT8E5M2 if wrong else TensorProto.FLOAT8E4M3FN
    return g.conv('x', 'conv')


@planted('FP8 input, INT8 weight', 'Q43', 'layer', opset=19)
def _mixed_weight(g, wrong):
    fp8(g, False)
    x = g.qdq('x')
    fp8(g, wrong)
    return conv(g, x, weight(g))


@planted('INT8 input, FP8 weight', 'Q43', 'layer', opset=19)
def _mixed_input(g, wrong):
    fp8(g, wrong)
    x = g.qdq('x')
    fp8(g, False)
    return conv(g, x, weight(g))


@planted('concat of INT8 and FP8', 'Q43', 'concat', opset=19)
def _mixed_concat(g, wrong):
    fp8(g, False)
    a = g.qdq('x')
    fp8(g, wrong)
    b = g.qdq(g.node('Relu', 'x'))
    fp8(g, False)
    y = g.qdq(g.node('Concat', a, b, axis=1))
    return conv(g, y, weight(g, g.channels, 2 * g.channels, 3, 3))


@planted('FP8 zero point', 'Q20', 'FP8', opset=19)
def _fp8_zero(g, wrong):
    fp8(g, False)
    return g.conv('x', 'conv', zero=int(wrong))


@planted('FP8 in a large kernel', 'Q45', opset=19, twin=False)
def _fp8_large(g, wrong):
    fp8(g, False)
    rows, columns = (3, 11) if wrong else (4, 8)
    w = weight(g, g.channels, g.channels, rows, columns)
    return g.node('Conv', g.qdq('x'), w, name='conv')


@planted('FP8 before a MaxPool', 'Q05', 'input', opset=19)
def _fp8_pool(g, wrong):
    fp8(g, False)
    pool = lambda x: g.node('MaxPool', x, kernel_shape=[2, 2], strides=[2, 2])  # noqa: E731
    y = pool(g.qdq('x')) if wrong else g.qdq(pool('x'))
    return conv(g, y, weight(g))


@planted('FP8 too early', 'Q44', opset=17, typed=(False,))
def _fp8_early(g, wrong):
    fp8(g, not wrong)
    return g.conv('x', 'conv')


@planted('integer operator', 'Q42', 'in the operator', twin=False)
def _operator(g, wrong):
    if not wrong:
        return g.conv('x', 'conv')
    c, zero = g.channels, g.constant(ZERO)
    scale = g.constant(np.float32(0.1))
    x = g.node('Cast', 'x', to=TensorProto.FLOAT)
    q = g.node('QuantizeLinear', x, scale, zero)
    w = g.constant(np.ones((c, c, 3, 3), np.int8))
    y = g.node('QLinearConv', q, scale, zero, w, scale, zero, scale, zero, pads=[1] * 4)
    y = g.node('DequantizeLinear', y, scale, zero)
    return g.node('Cast', y, to=TensorProto.FLOAT16 if g.half else TensorProto.FLOAT)


@planted('dynamic quantization', 'Q42', 'while it runs', twin=False)
def _dynamic(g, wrong):
    if not wrong:
        return g.conv('x', 'conv')
    x = g.node('Cast', 'x', to=TensorProto.FLOAT)
    outs = ['dynamic', 'dynamic_scale', 'dynamic_zero']
    g.nodes.append(helper.make_node('DynamicQuantizeLinear', [x], outs))
    y = g.node('DequantizeLinear', *outs)
    y = g.node('Cast', y, to=TensorProto.FLOAT16 if g.half else TensorProto.FLOAT)
    return conv(g, y, g.weight(g.channels, g.channels, 3, 3))
