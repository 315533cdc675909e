"""OpenVINO's sparse operators on a CPU, against their definition."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from mmdet3d_quant.engines import EngineError, ONNXRuntime
from tests.engines.plugin_files import (
    ARRAYS,
    CONVOLUTIONS,
    SHAPE,
    TYPES,
    by_definition,
    cloud,
    save,
    three,
    weights_of,
)

DOMAIN = 'org.openvinotoolkit'


def convolution(filters, bias=(), kind='fp32', outputs=('made', 'places'), **more):
    """Node and weight (K, inputs, outputs) of a convolution, from filters as spconv has them."""
    weight = filters.reshape(len(filters), -1, filters.shape[-1]).transpose(1, 2, 0)
    attributes = dict(
        kernel_size=[*filters.shape[1:4]], input_spatial_shape=[*SHAPE],
        in_channels=filters.shape[-1], out_channels=len(filters),
    )  # fmt: skip
    attributes.update(more)
    names = ['features', 'indices', 'weight', *(['bias'] if len(bias) else [])]
    node = helper.make_node(
        'SparseConvolution', names, outputs, 'conv', domain=DOMAIN, **attributes
    )
    constants = {'weight': np.ascontiguousarray(weight).astype(ARRAYS[kind])}
    return node, {**constants, **({'bias': bias.astype(ARRAYS[kind])} if len(bias) else {})}


def file_of(path, nodes, outputs, constants, kind='fp32', channels=4):
    return save(
        path, nodes,
        [('features', TYPES[kind], ['n', channels]), ('indices', TensorProto.INT32, ['n', 4])],
        outputs, constants,
    )  # fmt: skip


MADE = [('made', TensorProto.FLOAT, ['m', 5]), ('places', TensorProto.INT32, ['m', 4])]


@pytest.mark.parametrize('kernel, stride, padding, dilation, subm', CONVOLUTIONS)
def test_a_convolution_is_its_definition(kernel, stride, padding, dilation, subm, tmp_path):
    features, indices = cloud(120, SHAPE, 4, batch=2)
    filters, bias = weights_of(kernel), np.linspace(-1, 1, 5, dtype=np.float32)
    node, constants = convolution(
        filters, bias, stride=[*three(stride)], padding=[*three(padding)],
        dilation=[*three(dilation)], submanifold=int(subm), activation='ReLU', rulebook='one',
    )  # fmt: skip
    engine = ONNXRuntime(file_of(tmp_path / 'a.onnx', [node], MADE, constants))
    found = engine({'features': features, 'indices': indices})
    wanted = by_definition(features, indices, filters, SHAPE, stride, padding, dilation, subm)
    places = [tuple(place) for place in found['places'].tolist()]
    assert sorted(places) == sorted(wanted)
    values = np.stack([wanted[place] for place in places])
    np.testing.assert_allclose(found['made'], np.maximum(values + bias, 0), atol=1e-5)


@pytest.mark.parametrize('voxels', [0, 1, 40])
@pytest.mark.parametrize('kind', ['fp32', 'fp16'])
@pytest.mark.parametrize('first', [0, 1])
def test_an_encoder_ends_in_a_map(voxels, kind, first, tmp_path):
    """Two convolutions and a map whose last axis joins the channels, and one that keeps it."""
    features, indices = cloud(voxels, SHAPE, 4)
    filters = weights_of(3)
    node, constants = convolution(filters, kind=kind, submanifold=1)
    fused = helper.make_node(
        'SparseToDense', ['made', 'places'], ['map'], domain=DOMAIN, spatial_shape=[*SHAPE],
        batch_size=1, channels_first=first,
    )  # fmt: skip
    whole = helper.make_node(
        'SparseToDense', ['made', 'places', 'shape', 'batch'], ['grid'], domain=DOMAIN,
        channels_first=first,
    )  # fmt: skip
    constants.update(shape=np.array(SHAPE, np.int32), batch=np.array([1], np.int32))
    outputs = [('map', TYPES[kind], None), ('grid', TYPES[kind], None)]
    file = file_of(tmp_path / 'a.onnx', [node, fused, whole], outputs, constants, kind)
    found = ONNXRuntime(file)({'features': features.astype(ARRAYS[kind]), 'indices': indices})

    half, places = ARRAYS[kind], [tuple(i) for i in indices.tolist()]
    wanted = by_definition(
        features.astype(half), indices, filters.astype(half), SHAPE, 1, 1, 1, True
    )
    assert set(wanted) == set(places)
    grid, x_cells = np.zeros((1, 5, *SHAPE)), SHAPE[2]
    joined = np.zeros((1, 5 * x_cells, *SHAPE[:2]))
    for (b, z, y, x), values in wanted.items():
        grid[b, :, z, y, x] = values
        joined[b, np.arange(5) * x_cells + x, z, y] = values
    if not first:
        grid, joined = np.moveaxis(grid, 1, -1), np.moveaxis(joined, 1, -1)
    assert found['map'].dtype == found['grid'].dtype == half
    for name, array in (('map', joined), ('grid', grid)):
        np.testing.assert_allclose(found[name], array, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize('layout', ['NHWC', 'NCHW'])
def test_bev_pooling_sums_what_falls_into_a_cell(layout, tmp_path):
    random = np.random.default_rng(0)
    cameras, bins, height, width, channels = 2, 4, 3, 5, 6
    feat = random.standard_normal((cameras, height, width, channels)).astype(np.float32)
    depth = random.random((cameras, bins, height, width)).astype(np.float32)
    indices = random.permutation(depth.size)[:90].astype(np.int32)
    intervals = np.array([[0, 30, 3], [30, 31, 0], [31, 31, 8], [40, 90, 41]], np.int32)
    node = helper.make_node(
        'BevPoolV2', ['feat', 'depth', 'idx', 'itv'], ['out'], 'pool', domain=DOMAIN,
        input_channels=channels, output_channels=channels, image_width=width,
        image_height=height, feature_width=7, feature_height=6, feat_layout=layout,
        d_bound_min=1.0, d_bound_max=5.0, d_bound_step=1.0,
    )  # fmt: skip
    file = save(
        tmp_path / 'a.onnx', [node],
        [('feat', TensorProto.FLOAT, None), ('depth', TensorProto.FLOAT, None),
         ('idx', TensorProto.INT32, None), ('itv', TensorProto.INT32, None)],
        [('out', TensorProto.FLOAT, None)],
    )  # fmt: skip
    given = feat.transpose(0, 3, 1, 2) if layout == 'NCHW' else feat
    engine = ONNXRuntime(file)
    engine.input_shapes = {}  # of open rank
    found = engine(dict(feat=given, depth=depth, idx=indices, itv=intervals))['out']
    wanted = np.zeros((cameras, channels, 42))
    for start, end, cell in intervals:
        for index in indices[start:end]:
            camera, _, y, x = np.unravel_index(index, depth.shape)
            wanted[0, :, cell] += feat[camera, y, x] * depth.ravel()[index]
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1e-5)
    with pytest.raises(EngineError, match="'pool'.*depths"):
        engine(dict(feat=given, depth=depth, idx=indices + 999, itv=intervals))


@pytest.mark.parametrize(
    'more, message',
    [
        (dict(activation='Gelu'), "'conv'.*activation.*None or ReLU"),
        (dict(input_spatial_shape=[0, 0, 0]), 'cells of the grid, is missing'),
        (dict(kernel_size=[1000, 3, 3]), 'kernel_size'),
        (dict(groups=2), "attribute 'groups'"),
        (dict(submanifold=1, kernel_size=[2, 2, 2]), 'odd kernels'),
        (dict(input_spatial_shape=[1, 1, 1], padding=[0, 0, 0]), 'no room'),
    ],
)
def test_nodes_that_break_their_contract_are_refused_on_loading(more, message, tmp_path):
    node, constants = convolution(weights_of(3), **more)
    with pytest.raises(EngineError, match=message):
        ONNXRuntime(file_of(tmp_path / 'a.onnx', [node], MADE, constants))


@pytest.mark.parametrize(
    'more, message',
    [
        (dict(output_bound=10), r"'conv'.*output_bound is 10"),
        (dict(output_spatial_shape=[1, 2, 3]), r"'conv'.*the convolution makes \[9, 8, 11\]"),
        (dict(out_channels=6), 'out_channels is 6'),
    ],
)
def test_what_does_not_fit_names_the_node(more, message, tmp_path):
    features, indices = cloud(40, SHAPE, 4)
    node, constants = convolution(weights_of(3), **more)
    engine = ONNXRuntime(file_of(tmp_path / 'a.onnx', [node], MADE, constants))
    with pytest.raises(EngineError, match=message):
        engine({'features': features, 'indices': indices})


def test_a_map_too_large_takes_no_memory(tmp_path):
    features, indices = cloud(4, SHAPE, 4)
    node = helper.make_node(
        'SparseToDense', ['features', 'indices'], ['map'], 'big', domain=DOMAIN,
        spatial_shape=[60000, 60000, 60000],
    )  # fmt: skip
    outputs = [('map', TensorProto.FLOAT, None)]
    engine = ONNXRuntime(file_of(tmp_path / 'a.onnx', [node], outputs, {}))
    with pytest.raises(EngineError, match="'big'.*numbers"):
        engine({'features': features, 'indices': indices})
