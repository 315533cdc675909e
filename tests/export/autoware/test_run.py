"""The files, run as they are, against the model that they were made of."""

import numpy as np
import onnx
import pytest
import torch

from mmdet3d_quant.check.runs import sqnr
from mmdet3d_quant.engines import ONNXRuntime
from mmdet3d_quant.export.autoware.modules import Body
from mmdet3d_quant.export.sparse import trace
from mmdet3d_quant.export.sparse.arithmetic import AUTOWARE, with_int8
from mmdet3d_quant.export.sparse.run import ScnNetwork
from tests.export.autoware.detectors import detector, files
from tests.export.detectors import small_detector


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    cfg, batch = small_detector(tmp_path_factory.mktemp('small'))
    return detector(cfg.model.to_dict(), batch, camera=False), batch


def voxels_of(model, points):
    voxels, coors, counts = model.pts_voxel_layer(points.float())
    arrays = dict(voxels=voxels, coors=coors.int(), num_points_per_voxel=counts.int())
    return {name: value.numpy() for name, value in arrays.items()}


@torch.no_grad()
def run(model, batch, folder, stages):
    """Map and outputs of the file; the map of the model in Autoware's arithmetic."""
    made, _ = files(model, batch, folder, int8_stages=stages)
    graph = made['bevfusion_lidar']
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info('lidar'))
    onnx.save(graph, str(folder / 'watched.onnx'))
    points = batch['inputs']['points'][0]
    found = ONNXRuntime(folder / 'watched.onnx')(voxels_of(model, points))
    program = trace(model.pts_middle_encoder, arithmetic=with_int8(AUTOWARE, stages))
    features, coors, _ = model.voxelize([points])
    return found, ScnNetwork(program, True, torch.float64)(features, coors).numpy()


@pytest.mark.parametrize('stages', [(), AUTOWARE.int8, ('*',)], ids=['none', 'default', 'all'])
def test_a_file_computes_what_the_model_does_in_autowares_arithmetic(small, tmp_path, stages):
    found, wanted = run(*small, tmp_path, stages)
    assert np.isfinite(found['lidar']).all() and np.abs(wanted).max() > 0
    assert sqnr(wanted, found['lidar']) > 60
    with torch.no_grad():  # on the same map the dense part gives the same boxes
        rows, score, labels = (t.numpy() for t in Body(small[0])(torch.from_numpy(found['lidar'])))
    assert np.array_equal(np.sort(labels), np.sort(found['label_pred']))
    np.testing.assert_allclose(np.sort(score), np.sort(found['score']), atol=2e-3)
