"""OpenVINO's preparation on random graphs: the numbers of ONNX Runtime, to the last bit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines import ONNXRuntime, OpenVINO
from mmdet3d_quant.engines.openvino.graph import prepare
from mmdet3d_quant.engines.openvino.nodes import is_constant, operators
from tests.engines.graphs import random_graph
from tests.versions import OPENVINO_2024

#: Where float32 is exact, only a scale that an engine computes is not.
TOLERANCE = 1e-5


def assert_equal(expected, found, what):
    assert set(expected) == set(found), what
    for name, value in expected.items():
        np.testing.assert_allclose(
            found[name], value, 0, TOLERANCE * max(float(np.abs(value).max()), 1e-9), err_msg=what
        )


def without_int8(model):
    """Compiles a model so that OpenVINO runs it in float32, whatever is quantized."""
    options = dict(LP_TRANSFORMS_MODE='NO', INFERENCE_PRECISION_HINT='f32')
    return ov.compile_model(model, 'CPU', options)


def check(seed, folder):
    """Compares engines, and OpenVINO's float kernels before and after the preparation."""
    model, inputs = random_graph(seed)
    path = folder / f'{seed}.onnx'
    onnx.save(model, path)
    expected = ONNXRuntime(path, 1)(inputs)
    grouped = any(
        n.op_type == 'ConvTranspose' and a.name == 'group' and a.i > 1
        for n in model.graph.node
        for a in n.attribute
    )
    if not grouped:  # whose bias the evaluator gets wrong
        by_numpy = ReferenceEvaluator(model).run(None, inputs)
        assert_equal(dict(strict_zip(expected, by_numpy)), expected, f'seed {seed}, numpy')
    assert_equal(expected, OpenVINO(path, 1)(inputs), f'seed {seed}')
    # The old one loses roundings of 16 bits where it is told to quantize nothing.
    for change in () if OPENVINO_2024 else (lambda model: None, prepare):
        read = ov.Core().read_model(str(path))
        change(read)
        found = without_int8(read)(inputs)
        values = [np.array(found[i]) for i in range(len(expected))]
        assert_equal(expected, dict(strict_zip(expected, values)), f'seed {seed}, {change}')


def graph(folder, nodes, constants, shape, outputs):
    """Writes a graph of ``x`` and loads it in both engines; returns their outputs."""
    made = helper.make_graph(
        [helper.make_node(k, i.split(), [o], name, **a) for k, i, o, name, a in nodes],
        'graph',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info(o) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    for value in made.output:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    opset = helper.make_opsetid('', 17)
    path = folder / 'graph.onnx'
    onnx.save(helper.make_model(made, opset_imports=[opset], ir_version=8), path)
    inputs = {'x': np.random.default_rng(0).standard_normal(shape, np.float32) * 3}
    expected = ONNXRuntime(path, 1)(inputs)
    for node in made.node:  # ONNX Runtime refuses two of one name
        node.name = node.name.rstrip('0123456789')
    onnx.save(helper.make_model(made, opset_imports=[opset], ir_version=8), path)
    return expected, OpenVINO(path, 1)(inputs)


SCALES = dict(s=np.float32(2**-5), z=np.int8(0), u=np.uint8(0), w=np.ones((4, 8, 1, 1), np.int8))


def pair(data, out, zero='z', scale='s'):
    """A Q/DQ pair, as :func:`graph` takes it."""
    return [
        ('QuantizeLinear', f'{data} {scale} {zero}', f'{out}q', f'{out}q', {}),
        ('DequantizeLinear', f'{out}q {scale} {zero}', out, out, {}),
    ]


@pytest.mark.parametrize('zero', 'zu')
def test_a_concat_of_a_signed_and_a_never_negative_map_keeps_its_steps(tmp_path, zero):
    """One scale; the second is INT8 or UINT8 in the file."""
    nodes = [
        ('Relu', 'x', 'r', 'r', {}),
        *pair('x', 'a'),
        *pair('r', 'b', zero),
        ('Concat', 'a b', 'c', 'c', dict(axis=1)),
        ('DequantizeLinear', 'w s z', 'wd', 'wd', {}),
        ('Conv', 'c wd', 'y', 'y', {}),
    ]
    expected, found = graph(tmp_path, nodes, SCALES, [1, 4, 6, 6], ['y'])
    assert_equal(expected, found, zero)


def test_a_product_behind_a_rounding_is_kept(tmp_path):
    nodes = [*pair('x', 'a'), ('Mul', 'a half', 'y', 'y', {})]
    constants = dict(SCALES, half=np.float32(-0.5))
    expected, found = graph(tmp_path, nodes, constants, [1, 4, 6, 6], ['y'])
    assert_equal(expected, found, 'product')


def test_nodes_of_one_name_are_not_taken_for_each_other(tmp_path):
    nodes = [
        ('Relu', 'x', 'r', 'same1', {}),
        ('Neg', 'x', 'n', 'same2', {}),
        *pair('r', 'a'),
        *pair('n', 'b'),
        ('Sub', 'a b', 'y', 'y', {}),
    ]
    expected, found = graph(tmp_path, nodes, SCALES, [1, 4, 6, 6], ['y'])
    assert_equal(expected, found, 'names')


def test_a_weight_is_not_constant_because_of_a_name(tmp_path):
    """The path to the input is behind the second node of a name."""
    opset = operators()
    x = opset.parameter([2], np.float32)
    stored, computed = opset.abs(opset.constant(np.float32([1, 2]))), opset.abs(x)
    for node in (stored, computed):
        node.set_friendly_name('same')
    for sides in ((stored, computed), (computed, stored)):
        assert not is_constant(opset.add(*sides).output(0))
    assert is_constant(stored.output(0))


def test_outputs_that_become_one_tensor_keep_their_names(tmp_path):
    nodes = [*pair('x', 'a'), *pair('x', 'b')]
    expected, found = graph(tmp_path, nodes, SCALES, [1, 4, 6, 6], ['a', 'b'])
    assert_equal(expected, found, 'outputs')


def test_an_average_of_integers_and_a_filled_border_are_exact(tmp_path):
    nodes = [
        *pair('x', 'a'),
        ('AveragePool', 'a', 'p', 'p', dict(kernel_shape=[2, 2], strides=[2, 2])),
        ('Add', 'p half', 'y', 'y', {}),
        ('Pad', 'a pads half', 'q', 'q', {}),
    ]
    constants = dict(SCALES, half=np.float32(0.5), pads=np.int64([0, 0, 1, 0, 0, 0, 0, 1]))
    expected, found = graph(tmp_path, nodes, constants, [1, 4, 6, 6], ['y', 'q'])
    assert_equal(expected, found, 'float')


AVERAGE = dict(kernel_shape=[2, 2], strides=[2, 2])
CUBIC = dict(mode='cubic', coordinate_transformation_mode='half_pixel')


@pytest.mark.parametrize(
    'node',
    [
        ('Concat', 'a n', 'c', 'c', dict(axis=1)),
        ('Concat', 'a nines', 'c', 'c', dict(axis=1)),
        ('Resize', 'a none sizes', 'c', 'c', CUBIC),
    ],
    ids=['float', 'constant', 'cubic'],
)
def test_values_beyond_the_range_of_a_rounded_map_are_not_cut_off(tmp_path, node):
    """A map that holds a rounded one, which ends at 4, and larger values."""
    nodes = [
        *pair('x', 'a'),
        ('Neg', 'x', 'n', 'n', {}),
        node,
        ('AveragePool', 'c', 'y', 'y', AVERAGE),
    ]
    constants = dict(
        SCALES,
        nines=np.full((1, 2, 6, 6), 9, np.float32),
        none=np.float32([]),
        sizes=np.float32([1, 1, 2, 2]),
    )
    expected, found = graph(tmp_path, nodes, constants, [1, 4, 6, 6], ['y'])
    assert_equal(expected, found, 'range')


def test_zeros_of_a_join_of_two_ranges_stay_zero(tmp_path):
    nodes = [
        ('Mul', 'x tiny', 'm', 'm', {}),
        *pair('m', 'a', scale='four'),
        *pair('m', 'b', scale='eight'),
        ('Concat', 'a b', 'y', 'y', dict(axis=1)),
    ]
    constants = dict(z=np.int8(0), tiny=np.float32(0.01), four=np.float32(4), eight=np.float32(8))
    expected, found = graph(tmp_path, nodes, constants, [1, 4, 6, 6], ['y'])
    assert not expected['y'].any()
    assert_equal(expected, found, 'zeros')


def test_averages_between_two_steps_are_rounded_to_the_even_one(tmp_path):
    nodes = [
        ('Relu', 'x', 'r', 'r', {}),
        *pair('r', 'a'),
        ('AveragePool', 'a', 'p', 'p', AVERAGE),
        *pair('p', 'y', scale='half'),
    ]
    constants = dict(SCALES, half=np.float32(2**-6))
    expected, found = graph(tmp_path, nodes, constants, [1, 8, 60, 60], ['y'])
    assert_equal(expected, found, 'ties')


def test_a_product_of_two_rounded_maps_is_exact(tmp_path):
    nodes = [
        *pair('x', 'a'),
        ('Neg', 'x', 'n', 'n', {}),
        *pair('n', 'b'),
        ('Transpose', 'b', 't', 't', dict(perm=[0, 1, 3, 2])),
        ('MatMul', 'a t', 'y', 'y', {}),
    ]
    expected, found = graph(tmp_path, nodes, SCALES, [1, 4, 6, 6], ['y'])
    assert_equal(expected, found, 'product')


def test_all_of_this_holds_on_a_cpu_without_vnni():
    """OpenVINO takes the processor for one with AVX2 only, in a process of its own."""
    cases = ['-m', 'pytest', '-q', '-k', 'not random and not vnni', __file__]
    variables = dict(os.environ, ONEDNN_MAX_CPU_ISA='AVX2')
    done = subprocess.run(
        [sys.executable, *cases],
        env=variables,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_random_graphs_keep_their_numbers(tmp_path):
    for seed in range(40):
        check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('start', range(1000, 3000, 100))
def test_many_random_graphs_keep_their_numbers(tmp_path, start):
    for seed in range(start, start + 100):
        check(seed, tmp_path)
