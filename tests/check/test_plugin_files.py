"""Files of runtimes with plugins in the place of a detector's layers."""

import pytest
import torch

from mmdet3d_quant import set_mode
from mmdet3d_quant.check.detector import engine_detector
from mmdet3d_quant.engines import ONNXRuntime
from mmdet3d_quant.export import ExportError, export_suite
from mmdet3d_quant.export.examples import capture_inputs
from tests.export.autoware.detectors import detector, files
from tests.export.detectors import small_detector


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return small_detector(tmp_path_factory.mktemp('small'))


@pytest.mark.parametrize('camera', [False, True])
@torch.no_grad()
def test_boxes_are_those_of_the_model(camera, small, tmp_path):
    """Float files, of which the sparse part is FP16: boxes move by less than a tenth of a cell."""
    cfg, batch = small
    model = detector(cfg.model.to_dict(), batch, camera)
    with set_mode(model, 'float'):
        inputs = capture_inputs(model, batch, 'autoware')
        files(model, batch, tmp_path, inputs, quantized=False, fp16=False)
        wanted = model.test_step(batch)[0].pred_instances_3d
        made = engine_detector(model, tmp_path, ONNXRuntime)
        found = made.test_step(batch)[0].pred_instances_3d
    assert len(found) == len(wanted) == 20
    apart = torch.cdist(found.bboxes_3d.tensor, wanted.bboxes_3d.tensor)
    near, which = apart.min(1)
    same = (near < 0.1) & (found.labels_3d == wanted.labels_3d[which])
    same &= (found.scores_3d - wanted.scores_3d[which]).abs() < 0.01
    assert same.float().mean() > 0.9


def test_a_missing_file_is_told(small, tmp_path):
    cfg, batch = small
    model = detector(cfg.model.to_dict(), batch, camera=False)
    files(model, batch, tmp_path, only=())
    (tmp_path / 'bevfusion_lidar.onnx').unlink()
    with pytest.raises(ExportError, match='bevfusion_lidar.onnx does not exist.*--runtime auto'):
        engine_detector(model, tmp_path, ONNXRuntime)


@torch.no_grad()
def test_openvinos_encoder_takes_the_place_of_the_models(small, tmp_path):
    cfg, batch = small
    model = detector(cfg.model.to_dict(), batch, camera=False)
    with set_mode(model, 'float'):
        inputs, options = capture_inputs(model, batch), dict(runtime='openvino', target='openvino')
        export_suite(model, inputs, tmp_path, {}, False, tell=lambda name: None, **options)
        made, maps = engine_detector(model, tmp_path, ONNXRuntime, scn=True), []
        for net in (model, made):
            net.pts_middle_encoder.register_forward_hook(lambda m, a, out: maps.append(out))
            net.test_step(batch)
    assert type(made.pts_middle_encoder) is not type(model.pts_middle_encoder)
    torch.testing.assert_close(maps[1], maps[0], atol=1e-3, rtol=1e-3)
