"""The LiDAR body for Autoware against the plugins' contract and the model it was made of."""

import copy

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mmdet3d_quant.core.modes import set_mode
from mmdet3d_quant.export import ExportError
from mmdet3d_quant.layers.fold import fold_known
from tests.export.autoware import contract
from tests.export.autoware.detectors import detector, files
from tests.export.detectors import small_detector


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    cfg, batch = small_detector(tmp_path_factory.mktemp('small'))
    return detector(cfg.model.to_dict(), batch, camera=False), batch


@pytest.fixture(scope='module')
def body(small, tmp_path_factory):
    made, manifest = files(*small, tmp_path_factory.mktemp('onnx'))
    return made['bevfusion_lidar'], manifest


def nodes(model, kind):
    return [n for n in model.graph.node if n.op_type == kind]


def stored(model):
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def value(node, name):
    return next(helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def test_the_file_has_the_tensors_of_the_contract(small, body):
    model, manifest = body
    assert contract.ports(model.graph.input) == contract.VOXELS
    proposals = small[0].bbox_head.num_proposals
    assert contract.ports(model.graph.output) == contract.boxes(proposals)
    domains = {o.domain: o.version for o in model.opset_import}
    assert domains == {'': 17, contract.DOMAIN: 1}
    assert list(manifest['files']) == ['bevfusion_lidar.onnx'] and manifest['runtime'] == 'autoware'


def test_every_plugin_has_the_attributes_types_and_shapes_of_the_contract(body):
    model, _ = body
    weights, kinds = stored(model), 0
    for node in model.graph.node:
        assert (node.domain == contract.DOMAIN) == (node.op_type in contract.ATTRIBUTES)
        if node.op_type not in contract.ATTRIBUTES:
            continue
        int8 = node.op_type == 'ImplicitGemm' and len(node.input) == 7
        wanted = {**contract.ATTRIBUTES[node.op_type], **(contract.INT8 if int8 else {})}
        assert contract.types_of(node) == wanted, node.name
        kinds += int8
        if node.op_type == 'GetIndicePairsImplicitGemm':
            assert len(node.input) == 1 and len(node.output) == 5
            assert value(node, 'batch_size') == 1 and value(node, 'transpose') == 0
            continue
        weight = weights[node.input[1]]
        pairs = next(n for n in model.graph.node if node.input[2] in n.output)
        assert weight.dtype == np.float16
        assert list(weight.shape[1:4]) == value(pairs, 'ksize')
        assert value(node, 'is_subm') == value(pairs, 'subm')
        assert list(node.input[2:5]) == list(pairs.output[1:4])
        for extra, dtype in zip(node.input[5:], [np.float32] * 2 if int8 else [np.float16]):
            assert weights[extra].dtype == dtype and weights[extra].shape == weight.shape[:1]
    assert kinds


def test_nothing_is_rounded_by_q_dq_between_plugins(body):
    graph = body[0].graph
    makers = {o: n for n in graph.node for o in n.output}
    for node in nodes(body[0], 'ImplicitGemm'):
        source = makers[node.input[0]]
        assert source.op_type in ('ImplicitGemm', 'Relu', 'Cast')
    (last,) = nodes(body[0], 'ScatterND')
    assert nodes(body[0], 'QuantizeLinear')  # of the dense parts
    assert makers[last.input[2]].op_type == 'Cast'


def test_scales_are_those_of_the_model(small, body):
    """Recomputed from the ranges and weights of the model, batch norm folded by hand."""
    encoder = copy.deepcopy(small[0].pts_middle_encoder)
    with set_mode(encoder, 'quant'):
        fold_known(encoder, quantized=True)
    layers = dict(encoder.named_modules())
    weights, seen = stored(body[0]), []
    for node in nodes(body[0], 'ImplicitGemm'):
        layer = layers[node.name[len('lidar/') :]]
        raw = layer.weight.detach().numpy()
        assert np.array_equal(weights[node.input[1]], raw.astype(np.float16)), node.name
        if len(node.input) < 7:
            continue
        seen.append(node.name)
        step = float(layer._input_quantizer.amax) / 127
        assert value(node, 'input_scale') == pytest.approx(step, rel=1e-6)
        assert value(node, 'precision') == 1
        of_weight = layer._weight_quantizer.amax.flatten().numpy() / 127
        np.testing.assert_allclose(weights[node.input[5]], step * of_weight, rtol=1e-6)
        bias = layer.bias.detach().numpy().astype(np.float16).astype(np.float32)
        assert np.array_equal(weights[node.input[6]], bias)
    assert all('encoder_layer3' in n or 'encoder_layer4' in n or 'conv_out' in n for n in seen)
    assert len(seen) > 2


@pytest.mark.parametrize(
    ('stages', 'count'), [((), 0), (('conv_out',), 1), (('*',), None)], ids=['none', 'one', 'all']
)
def test_stages_are_chosen_by_pattern(small, tmp_path, stages, count):
    made, manifest = files(*small, tmp_path, int8_stages=stages)
    convs = nodes(made['bevfusion_lidar'], 'ImplicitGemm')
    int8 = [n for n in convs if len(n.input) == 7]
    assert len(int8) == (len(convs) if count is None else count)
    entry = manifest['files']['bevfusion_lidar.onnx']
    assert [e['precision'] for e in entry['sparse']].count('int8') == len(int8)


def test_the_manifest_says_what_becomes_of_odd_clouds(small, body):
    entry = body[1]['files']['bevfusion_lidar.onnx']
    bound = small[0].pts_voxel_layer.max_voxels
    assert entry['voxels']['max'] == min(bound[1], 256_000)
    assert {'none', 'one', 'more'} <= set(entry['voxels'])
    assert entry['boxes']['coding'] == 'mmdet3d'
    assert set(entry['inputs']) == set(contract.VOXELS)


def test_what_the_plugins_lack_is_refused_by_name(small, tmp_path):
    model, batch = copy.deepcopy(small[0]), small[1]
    head = model.bbox_head.prediction_heads[0]
    del head.vel, head.heads['vel']
    with pytest.raises(ExportError, match=r'no velocity.*vel=\(2, 2\)'):
        files(model, batch, tmp_path)


def test_the_graph_is_sound(body):
    onnx.checker.check_model(body[0], full_check=True)
