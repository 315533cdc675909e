"""The set of files of detectors that are not the ResNet-50 one with both sensors."""

import json

import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import ConfigDict
from torch import nn

from mmdet3d_quant import calibrate, set_mode, ties
from mmdet3d_quant import from_config as fc
from mmdet3d_quant.export import ExportError, capture_inputs, export_suite, generate_inputs
from mmdet3d_quant.export.verify import verify
from mmdet3d_quant.samples import make_frame
from tests.small import small_config

SWIN = dict(
    type='mmdet.SwinTransformer',
    embed_dims=24,
    depths=[2, 2, 2, 2],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    out_indices=(1, 2, 3),
)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """Config of the small detector and a batch."""
    folder = tmp_path_factory.mktemp('small')
    cfg = fc.read_config(small_config(make_frame(folder / 'frame'), folder / 'small.py'))
    fc.build_model(cfg)
    return cfg, next(iter(fc.build_calibration_loader(cfg)[1]))


def exported(model_cfg, batch, folder):
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(model_cfg))  # which the public project's head wants
    model.eval()
    calibrate(model, [batch])
    inputs = capture_inputs(model, batch)
    cuts, manifest = export_suite(model, inputs, folder, {}, tell=lambda name: None)
    assert json.loads((folder / 'manifest.json').read_text()) == manifest
    for cut in cuts:
        for r in verify(cut, folder / f'{cut.name}.onnx'):
            if r.fake_quant != float('inf'):
                assert r.openvino > r.fake_quant + 3 and r.int8_convs > 0, r
    return model, manifest


def test_a_swin_backbone_stays_float_and_only_has_fewer_ties(small, tmp_path):
    cfg = small[0].model.to_dict()
    cfg['img_backbone'] = SWIN
    cfg['img_neck']['in_channels'] = [48, 96, 192]
    model, manifest = exported(cfg, small[1], tmp_path)
    assert len(manifest['files']) == 4
    assert not any('img_backbone' in name for group in ties(model) for name in group)


def test_a_camera_only_detector_exports_the_files_it_has(small, tmp_path):
    cfg = small[0].model.to_dict()
    for part in ('pts_voxel_encoder', 'pts_middle_encoder', 'fusion_layer'):
        del cfg[part]
    cfg['pts_backbone']['in_channels'] = 16
    _, manifest = exported(cfg, small[1], tmp_path)
    wanted = {'camera.backbone.onnx', 'camera.vtransform.onnx', 'head.bbox.onnx'}
    assert set(manifest['files']) == wanted


def test_generated_inputs_have_the_shapes_of_real_ones(small):
    model = fc.build_model(small[0])
    calibrate(model, [small[1]], 'max')
    real, generated = capture_inputs(model, small[1]), generate_inputs(model)
    assert {k: v.shape for k, v in real.items()} == {k: v.shape for k, v in generated.items()}


def test_a_batch_of_two_is_refused(small):
    """Its images would pass for those of twice as many cameras."""
    model = fc.build_model(small[0])
    two = {
        k: {n: v * 2 for n, v in d.items()} if k == 'inputs' else d * 2 for k, d in small[1].items()
    }
    with set_mode(model, 'float'), pytest.raises(ValueError, match='one sample, got 2'):
        capture_inputs(model, two)


def test_nothing_to_export_is_an_error(tmp_path):
    with pytest.raises(ExportError, match='no part that can be exported'):
        export_suite(nn.Linear(2, 2), {}, tmp_path, {})
