"""What is read off a graph, whatever form a file gives it."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from mmdet3d_quant.check.lint.graph import Graph
from mmdet3d_quant.export.graph import opset, stored_tensors
from mmdet3d_quant.export.manifest import describe_graph
from mmdet3d_quant.export.nonnegative import nonnegative_tensors
from mmdet3d_quant.export.passes import fold_shapes, to_opset

FORMS = dict(
    value=numpy_helper.from_array(np.array([[1.5, 2.0]], np.float32)),
    value_float=0.5,
    value_floats=[0.5, 1.5],
    value_int=3,
    value_ints=[1, 2, 3],
    value_string='linear',
)


def model_of(nodes, outputs, imports=(('', 17),), initializers=()):
    graph = helper.make_graph(
        nodes,
        'g',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, [2, 6])],
        [helper.make_empty_tensor_value_info(o) for o in outputs],
        list(initializers),
    )
    imported = [helper.make_opsetid(*pair) for pair in imports]
    return helper.make_model(graph, opset_imports=imported, ir_version=8)


@pytest.mark.parametrize('own', ['', 'ai.onnx'])
def test_the_opset_is_that_of_onnx_wherever_it_is_listed(own):
    """A runtime's own operators, listed first, have a version of their own."""
    nodes = [
        helper.make_node('Shape', ['x'], ['shape']),
        helper.make_node('Cast', ['shape'], ['small'], to=TensorProto.INT32),
        helper.make_node('Cast', ['small'], ['wide'], to=TensorProto.INT64),
        helper.make_node('Reshape', ['x', 'wide'], ['y']),
    ]
    model = model_of(nodes, ['y'], [('nv', 1), (own, 17)])
    assert opset(model) == 17 and describe_graph(model)['opset'] == 17
    assert to_opset(model, 17) is model
    fold_shapes(model)
    assert [n.op_type for n in model.graph.node] == ['Reshape']
    assert numpy_helper.to_array(stored_tensors(model.graph)['wide']).tolist() == [2, 6]


def test_a_model_without_onnx_operators_is_told():
    with pytest.raises(ValueError, match="no opset of ONNX itself; its domains: 'nv'"):
        opset(model_of([], ['x'], [('nv', 1)]))


def test_constants_are_found_in_every_form():
    """ONNX's reference runs the same nodes."""
    nodes = [helper.make_node('Constant', [], [n], **{n: value}) for n, value in FORMS.items()]
    kept = numpy_helper.from_array(np.array([7], np.int8), 'kept')
    model = model_of(nodes, list(FORMS), initializers=[kept])
    expected = ReferenceEvaluator(model).run(None, {'x': np.zeros((2, 6), np.float32)})
    expected = dict(zip(FORMS, expected), kept=np.array([7], np.int8))
    found = {n: numpy_helper.to_array(t) for n, t in stored_tensors(model.graph).items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == np.shape(value)
        assert np.array_equal(found[name].astype(str), np.asarray(value).astype(str)), name
    looked = Graph(model)
    assert all(looked.is_constant(n) and looked.constant(n) is not None for n in expected)
    assert not looked.is_constant('x')
    assert nonnegative_tensors(model.graph) == expected.keys() - {'value_string'}
