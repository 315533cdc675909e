"""Clouds of none, one, and more voxels than a file is for, run as the manifest says."""

import numpy as np
import onnx
import pytest
import torch

from mmdet3d_quant import set_mode
from mmdet3d_quant.check.runs import sqnr
from mmdet3d_quant.check.sparse import OpenVINONetwork
from mmdet3d_quant.engines import EngineError, ONNXRuntime
from mmdet3d_quant.engines.plugins import autoware
from mmdet3d_quant.export import export_suite
from mmdet3d_quant.export.autoware.modules import Body
from tests.export.autoware.detectors import detector, files
from tests.export.detectors import small_detector


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A detector, a frame, and its body, FP16 up to the map, which is an output, too."""
    cfg, batch = small_detector(tmp_path_factory.mktemp('small'))
    model, folder = detector(cfg.model.to_dict(), batch, camera=False), tmp_path_factory.mktemp('o')
    model.pts_voxel_layer.max_voxels = (2000, 2000)
    body, manifest = files(model, batch, folder, int8_stages=())
    graph = body['bevfusion_lidar']
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info('lidar'))
    onnx.save(graph, str(folder / 'tapped.onnx'))
    entry = manifest['files']['bevfusion_lidar.onnx']['voxels']
    return model, batch['inputs']['points'][0].float(), folder / 'tapped.onnx', entry


def voxels_of(model, points):
    voxels, coors, counts = model.pts_voxel_layer(points)
    arrays = dict(voxels=voxels, coors=coors.int(), num_points_per_voxel=counts.int())
    return {name: value.numpy() for name, value in arrays.items()}


def test_no_voxel_makes_a_map_of_zeros(made):
    model, points, file, says = made
    found = ONNXRuntime(file)({n: a[:0] for n, a in voxels_of(model, points).items()})
    assert 'a map of zeros' in says['none'] and not found['lidar'].any()
    with torch.no_grad():
        rows, score, labels = Body(model)(torch.zeros(found['lidar'].shape))
    np.testing.assert_allclose(np.sort(found['score']), score.sort()[0], atol=1e-5)
    assert found['bbox_pred'].shape == tuple(rows.shape) and np.isfinite(found['bbox_pred']).all()


def test_one_voxel_is_as_any_other(made):
    model, points, file, says = made
    arrays = {n: a[:1] for n, a in voxels_of(model, points).items()}
    found = ONNXRuntime(file)(arrays)
    assert says['one'] == 'as any other' and found['lidar'].any()
    mean = arrays['voxels'][:, : arrays['num_points_per_voxel'][0]].mean(1)
    place = np.concatenate([[[0]], arrays['coors'][:, ::-1]], 1).astype(np.int32)
    with set_mode(model, 'float'), torch.no_grad():
        plain = model.pts_middle_encoder(torch.from_numpy(mean), torch.from_numpy(place), 1)
    assert sqnr(plain, found['lidar']) > 50


def test_voxels_beyond_the_bound_are_left_out_before_the_file(made):
    model, points, file, says = made
    bound = says['max']
    rng = torch.Generator().manual_seed(0)
    low, high = torch.tensor(model.pts_voxel_layer.point_cloud_range).view(2, 3)
    many = torch.rand(20 * bound, points.shape[1], generator=rng)
    many[:, :3] = low + many[:, :3] * (high - low)
    arrays = voxels_of(model, many)
    assert (
        len(arrays['voxels']) == bound == 2000
        and 'leaves out what is beyond its bound' in says['more']
    )
    assert np.isfinite(ONNXRuntime(file)(arrays)['bbox_pred']).all()


def test_more_voxels_than_the_plugin_keeps_are_refused(made, monkeypatch):
    model, points, file, says = made
    assert autoware.ROOM == 256_000 and '256,000 voxels by layer' in says['more']
    monkeypatch.setattr(autoware, 'ROOM', 10)
    with pytest.raises(EngineError, match=r'lidar/.*and the plugin has room for 10: crop'):
        ONNXRuntime(file)(voxels_of(model, points))


def test_openvinos_file_and_its_manifest(made, tmp_path):
    model, points, *_ = made
    options = dict(runtime='openvino', target='openvino', only=['lidar.backbone'])
    _, manifest = export_suite(model, {}, tmp_path, {}, False, tell=lambda n: None, **options)
    says = manifest['files']['lidar.backbone.onnx']['voxels']
    graph = onnx.load(str(tmp_path / 'lidar.backbone.onnx')).graph
    bounds = {a.i for n in graph.node for a in n.attribute if a.name == 'output_bound'}
    assert bounds == {says['max']} and 'refuses more than output_bound' in says['more']
    features, coors, _ = model.voxelize([points])
    run = OpenVINONetwork(tmp_path / 'lidar.backbone.onnx', 'xyz')
    assert 'a map of zeros' in says['none'] and not run(features[:0], coors[:0]).any()
    assert says['one'] == 'as any other' and run(features[:1], coors[:1]).any()
