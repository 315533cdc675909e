"""What OpenVINO's passes take for never negative is so, and export's proof says it, too.

Both have tables of operators, of two languages. The engine's may know less, never more.
"""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmdet3d_quant.engines import ONNXRuntime
from mmdet3d_quant.engines.openvino.graph import _never_negative
from mmdet3d_quant.export.nonnegative import nonnegative_tensors

ov = pytest.importorskip('openvino')

SHAPE = [1, 4, 6, 6]
STORED = dict(
    flat=np.array([1, -1]),
    axis=np.array([0]),
    ones=np.ones((1, 4, 2, 2), np.float32),
    twice=np.array([1, 1, 2, 2], np.float32),
    none=np.array(0, np.float32),
    below=np.array(-1, np.float32),
)
#: By name: the operator's attributes and inputs; ``x`` is the tensor that is asked about.
CASES = {
    'Abs': (dict(), ['x']),
    'Exp': (dict(), ['x']),
    'Relu': (dict(), ['x']),
    'Sigmoid': (dict(), ['x']),
    'Softmax': (dict(axis=1), ['x']),
    'Tanh': (dict(), ['x']),
    'Neg': (dict(), ['x']),
    'Floor': (dict(), ['x']),
    'MaxPool': (dict(kernel_shape=[2, 2]), ['x']),
    'AveragePool': (dict(kernel_shape=[2, 2]), ['x']),
    'Reshape': (dict(), ['x', 'flat']),
    'Transpose': (dict(perm=[0, 2, 3, 1]), ['x']),
    'Unsqueeze': (dict(), ['x', 'axis']),
    'Squeeze': (dict(), ['x', 'axis']),
    'Concat': (dict(axis=1), ['x', 'y']),
    'Add': (dict(), ['x', 'y']),
    'Sub': (dict(), ['x', 'y']),
    'Mul': (dict(), ['x', 'y']),
    'Conv': (dict(), ['x', 'ones']),
    'Clip': (dict(), ['x', 'none', '']),
    'Clip below': (dict(), ['x', 'below', '']),
    'Resize nearest': (dict(mode='nearest'), ['x', '', 'twice']),
    'Resize linear': (dict(mode='linear'), ['x', '', 'twice']),
    'Resize cubic': (dict(mode='cubic'), ['x', '', 'twice']),
}


def made(case, rectified):
    """A file of one operator; its inputs come from a ReLU, or not."""
    attributes, inputs = CASES[case]
    first = 'Relu' if rectified else 'Identity'
    nodes = [helper.make_node(first, [f'in_{n}'], [n]) for n in 'xy' if n in inputs]
    nodes.append(helper.make_node(case.split()[0], inputs, ['out'], **attributes))
    graph = helper.make_graph(
        nodes,
        'one',
        [helper.make_tensor_value_info(f'in_{n}', 1, SHAPE) for n in 'xy' if n in inputs],
        [helper.make_tensor_value_info('out', TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, n) for n, v in STORED.items() if n in inputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)


@pytest.mark.parametrize('rectified', [True, False])
@pytest.mark.parametrize('case', CASES)
def test_the_engine_trusts_no_more_than_is_true(case, rectified, tmp_path):
    model = made(case, rectified)
    read = ov.Core().read_model(model.SerializeToString())
    trusted = _never_negative(read.outputs[0].get_node().input(0).get_source_output())
    if trusted:
        assert 'out' in nonnegative_tensors(model.graph)
    if case in ('Abs', 'Exp', 'Relu', 'Sigmoid', 'Softmax'):
        assert trusted
    if case in ('MaxPool', 'AveragePool', 'Add', 'Concat', 'Reshape', 'Resize nearest'):
        assert trusted == rectified
    onnx.save(model, tmp_path / 'm.onnx')
    rng = np.random.default_rng(0)
    inputs = {i.name: rng.normal(size=SHAPE).astype(np.float32) * 3 for i in model.graph.input}
    if trusted or 'out' in nonnegative_tensors(model.graph):
        assert ONNXRuntime(tmp_path / 'm.onnx')(inputs)['out'].min() >= 0
