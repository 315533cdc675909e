"""The file that pools camera features for OpenVINO: its node, and sums written by hand."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from mmdet3d_quant.export.bev_pool import as_bev_pool, bounds_of, finish_openvino, intervals_of
from mmdet3d_quant.export.cuts import Cut
from mmdet3d_quant.export.pairs import ExportError
from mmdet3d_quant.parents import LSSTransform
from mmdet3d_quant.parents.bev_pool import bev_pool

BOUNDS = dict(x=(-8.0, 8.0, 2.0), y=(-5.0, 5.0, 1.0), z=(-3.0, 5.0, 8.0), d=(1.0, 4.0, 0.5))


def view(**changes):
    given = dict(nx=torch.tensor([8, 10, 1]), feature_size=(3, 4), C=5, D=6)
    return SimpleNamespace(**{**given, **changes})


def pooled(a, feature, depth, indices, intervals):
    """What the plugin says that it sums, one number after the other."""
    pixels = a['image_width'] * a['image_height']
    bins = int((a['d_bound_max'] - a['d_bound_min']) / a['d_bound_step'])
    plane = a['feature_width'] * a['feature_height']
    out = np.zeros((len(feature), a['output_channels'], a['feature_height'], a['feature_width']))
    flat, rows, weights = out.reshape(-1), feature.reshape(-1, feature.shape[3]), depth.reshape(-1)
    for begin, end, cell in intervals:
        for place in indices[begin:end]:
            row = rows[place // (bins * pixels) * pixels + place % pixels]
            for c in range(a['output_channels']):
                flat[cell + c * plane] += row[c] * weights[place]
    return out


def test_node_by_the_contract_sums_what_the_model_does():
    model = as_bev_pool(view(), BOUNDS, cameras=2)
    node, first = model.graph.node
    assert (node.op_type, node.domain) == ('BevPoolV2', 'org.openvinotoolkit')
    a = {i.name: helper.get_attribute_value(i) for i in node.attribute}
    assert {
        n: a[n] for n in ('image_height', 'image_width', 'feature_height', 'feature_width')
    } == {
        'image_height': 3,
        'image_width': 4,
        'feature_height': 8,
        'feature_width': 10,
    }
    for axis, limits in BOUNDS.items():
        assert tuple(a[f'{axis}_bound_{end}'] for end in ('min', 'max', 'step')) == limits
    assert a['input_channels'] == a['output_channels'] == 5 and a['feat_layout'] == b'NHWC'
    rng = torch.Generator().manual_seed(0)
    context = torch.randn(2, 5, 3, 4, generator=rng)
    depth = torch.rand(2, 6, 3, 4, generator=rng)
    cells = torch.randint(-1, 80, (2, 6, 3, 4), generator=rng)
    indices, intervals = intervals_of(cells, 80)
    assert indices.dtype == intervals.dtype == torch.int32
    assert intervals[-1, 1] == len(indices) == int((cells >= 0).sum())
    arrays = (context.permute(0, 2, 3, 1).contiguous(), depth, indices, intervals)
    out = pooled(a, *(t.numpy() for t in arrays))
    assert not out[1:].any() and first.op_type == 'Slice'
    wanted = bev_pool(context, depth, cells, 80).reshape(8, 10, 5).permute(2, 0, 1)
    assert np.allclose(out[0], wanted.numpy(), atol=1e-5)
    onnx.checker.check_model(model)


def test_no_points_are_no_intervals():
    indices, intervals = intervals_of(torch.full((1, 2, 2, 2), -1), 4)
    assert indices.shape == (0,) and intervals.shape == (0, 3)


def test_what_the_node_cannot_do_is_refused():
    with pytest.raises(ExportError, match='2 heights.*zbound'):
        as_bev_pool(view(nx=torch.tensor([8, 10, 2])), BOUNDS, 1)
    with pytest.raises(ExportError, match='7 depth bins.*counts 6.*dbound'):
        as_bev_pool(view(D=7), BOUNDS, 1)


def transform(zbound):
    bounds = {f'{axis}bound': limits for axis, limits in {**BOUNDS, 'z': zbound}.items()}
    return LSSTransform(4, 5, (24, 32), (3, 4), **bounds)


def camera_backbone():
    return Cut('camera.backbone', torch.nn.Identity(), dict(img=torch.rand(1, 2, 3, 24, 32)), ())


def test_bounds_of_a_view_transform_are_those_of_its_config(tmp_path):
    made = transform(BOUNDS['z'])
    found = bounds_of(made)
    for axis, limits in BOUNDS.items():
        assert found[axis] == pytest.approx(limits)
    detector = SimpleNamespace(view_transform=made)
    entries, _ = finish_openvino(detector, tmp_path, True, None, [camera_backbone()], {})
    assert list(entries) == ['camera.pool.onnx']
    node = onnx.load(str(tmp_path / 'camera.pool.onnx')).graph.node[0]
    a = {i.name: helper.get_attribute_value(i) for i in node.attribute}
    for axis, limits in BOUNDS.items():
        assert [a[f'{axis}_bound_{end}'] for end in ('min', 'max', 'step')] == pytest.approx(limits)


def test_a_map_of_several_heights_is_left_to_the_caller_with_a_warning(tmp_path):
    detector = SimpleNamespace(view_transform=transform((-3.0, 5.0, 4.0)))
    with pytest.warns(UserWarning, match=r'camera.pool.onnx is not written.*2 heights.*zbound'):
        entries, _ = finish_openvino(detector, tmp_path, True, None, [camera_backbone()], {})
    assert '2 heights' in entries['camera.backbone.onnx']['no_pooling']
    assert not list(tmp_path.iterdir())
    assert finish_openvino(detector, tmp_path, True, None, [], {}) == ({}, [])
