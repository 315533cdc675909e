"""The float BEVFusion: its state dict, its sensors, its registration."""

import copy
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config

from mmdet3d_quant.core.compat import removeprefix
from mmdet3d_quant.data.samples import make_frame
from mmdet3d_quant.runs import from_config as fc
from tests.frame import FLOAT_CONFIG, ROOT
from tests.small import small_config

#: Of the public project's model with a ResNet-50: entries, and SHA-256 of their sorted lines
#: "name (shape)", spconv 2's layout.
PUBLISHED = (713, 'd02e2c4da4ecbae441abb1ae58c196f0ed1379bf0e92ea63435b10ebe5363b8a')


def test_state_dict_of_the_resnet50_model_is_the_published_one():
    state = fc.build_model(fc.read_config(FLOAT_CONFIG)).state_dict()
    lines = sorted(f'{name} {tuple(value.shape)}' for name, value in state.items())
    assert (len(lines), hashlib.sha256('\n'.join(lines).encode()).hexdigest()) == PUBLISHED


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """Float model settings of the small detector, and one batch."""
    folder = tmp_path_factory.mktemp('small')
    path = small_config(make_frame(folder / 'frame'), folder / 'small.py')
    cfg = fc.read_config(path)
    fc.build_model(cfg)  # registers what the config imports
    batch = next(iter(fc.build_calibration_loader(cfg)[1]))
    model = copy.deepcopy(cfg.model.to_dict())
    for part in model.values():
        if isinstance(part, dict) and str(part.get('type')).startswith('Quant'):
            part['type'] = removeprefix(part['type'], 'Quant')
    model['img_backbone']['type'] = 'mmdet.ResNet'
    return model, batch


def boxes(model_cfg, batch):
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(model_cfg))
    model.eval()
    with torch.no_grad():
        return model.test_step(copy.deepcopy(batch))[0].pred_instances_3d


def test_both_sensors_matter_and_the_result_is_repeatable(small):
    cfg, batch = small
    first, second = boxes(cfg, batch), boxes(cfg, batch)
    assert len(first) == 20 and torch.isfinite(first.bboxes_3d.tensor).all()
    assert torch.equal(first.bboxes_3d.tensor, second.bboxes_3d.tensor)
    dark = copy.deepcopy(batch)
    dark['inputs']['img'] = [torch.zeros_like(i) for i in dark['inputs']['img']]
    assert not torch.equal(boxes(cfg, dark).scores_3d, first.scores_3d)
    sparse = copy.deepcopy(batch)
    sparse['inputs']['points'] = [p[::10] for p in sparse['inputs']['points']]
    assert not torch.equal(boxes(cfg, sparse).scores_3d, first.scores_3d)


def without(cfg, *parts, channels):
    cfg = {k: v for k, v in cfg.items() if k not in parts}
    cfg['pts_backbone'] = dict(cfg['pts_backbone'], in_channels=channels)
    return cfg


def test_lidar_only(small):
    cfg = without(
        small[0], 'img_backbone', 'img_neck', 'view_transform', 'fusion_layer', channels=32
    )
    assert len(boxes(cfg, small[1])) == 20


def test_camera_only(small):
    cfg = without(small[0], 'pts_voxel_encoder', 'pts_middle_encoder', 'fusion_layer', channels=16)
    assert len(boxes(cfg, small[1])) == 20  # depth maps still come from the points
    cfg['view_transform'] = dict(cfg['view_transform'], type='LSSTransform')
    blind = copy.deepcopy(small[1])
    del blind['inputs']['points']
    assert len(boxes(cfg, blind)) == 20


@pytest.mark.parametrize('points', [np.zeros((0, 5)), np.full((3, 5), 900.0), np.zeros((1, 5))])
def test_empty_far_and_single_points(small, points):
    batch = copy.deepcopy(small[1])
    batch['inputs']['points'] = [torch.from_numpy(points).float()]
    assert torch.isfinite(boxes(small[0], batch).bboxes_3d.tensor).all()


def test_missing_inputs_and_parts_are_clear_errors(small):
    cfg, batch = small
    blind = copy.deepcopy(batch)
    del blind['inputs']['img']
    with pytest.raises(ValueError, match="expects inputs\\['imgs'\\]"):
        boxes(cfg, blind)
    with pytest.raises(ValueError, match='fusion_layer'):
        boxes({k: v for k, v in cfg.items() if k != 'fusion_layer'}, batch)


def test_the_config_is_not_changed_by_building(small):
    before = copy.deepcopy(small[0])
    MODELS.build(small[0])
    assert small[0] == before


def test_registration_yields_to_names_that_are_taken():
    code = """
from mmdet3d.registry import MODELS, TRANSFORMS
@MODELS.register_module()
class BEVFusion: pass
import mmdet3d_quant.bevfusion
assert MODELS.get('BEVFusion') is BEVFusion
assert 'DepthLSSTransform' not in MODELS.module_dict and 'ImageAug3D' not in TRANSFORMS.module_dict
assert 'QuantDepthLSSTransform' in MODELS.module_dict
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_int8_config_only_changes_types():
    int8 = str(FLOAT_CONFIG).replace('_nus-3d', '_int8_nus-3d')
    floating, quantized = Config.fromfile(FLOAT_CONFIG).model, Config.fromfile(int8).model

    def types(cfg, path=''):
        for key, value in cfg.items():
            if isinstance(value, dict):
                yield from types(value, f'{path}.{key}')
            else:
                yield f'{path}.{key}', value

    a, b = dict(types(floating)), dict(types(quantized))
    assert set(a) == set(b)
    changed = {k for k in a if a[k] != b[k]}
    assert changed and all(k.endswith('.type') and b[k].startswith('Quant') for k in changed)
