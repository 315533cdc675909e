"""OpenVINO's preparation on random graphs: the numbers of ONNX Runtime, to the last bit."""

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx.reference import ReferenceEvaluator

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines import ONNXRuntime, OpenVINO
from mmdet3d_quant.engines.openvino.graph import prepare
from tests.engines.graphs import random_graph

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
    for change in (lambda model: None, prepare):
        read = ov.Core().read_model(str(path))
        change(read)
        found = without_int8(read)(inputs)
        values = [np.array(found[i]) for i in range(len(expected))]
        assert_equal(expected, dict(strict_zip(expected, values)), f'seed {seed}, {change}')


def test_random_graphs_keep_their_numbers(tmp_path):
    for seed in range(40):
        check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('start', range(1000, 3000, 100))
def test_many_random_graphs_keep_their_numbers(tmp_path, start):
    for seed in range(start, start + 100):
        check(seed, tmp_path)
