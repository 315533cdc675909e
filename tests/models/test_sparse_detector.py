"""The quantized LiDAR branch inside the detector: configs, trained weights, odd clouds, a frame."""

import math

import pytest
import torch
from mmengine.config import Config
from torch.nn.modules.batchnorm import _BatchNorm

import mmdet3d_quant as mq
from mmdet3d_quant.core import modes
from mmdet3d_quant.data.samples import frame_settings, make_frame, real_frame
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.runs import from_config as fc
from tests.frame import on_real_frame
from tests.small import ROOT

TINY = ROOT / 'configs/bevfusion_tiny/bevfusion_tiny_lidar-cam'
FULL = ROOT / 'configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn'
WEIGHTS = ROOT / 'checkpoints/bevfusion_tiny_lidar-cam_synthetic.pth'
ALL_BUT_LIDAR = {
    'img_backbone', 'img_neck', 'view_transform', 'fusion_layer', 'pts_backbone', 'pts_neck',
    'bbox_head',
}  # fmt: skip
BRANCHES = dict(camera='view_transform', lidar='pts_middle_encoder', fused='fusion_layer')


def tiny(name):
    """The detector of a config, with the trained float weights."""
    model = fc.build_model(fc.read_config(f'{TINY}_{name}_synthetic.py'))
    fc.load_weights(model, WEIGHTS, calibrated=False)
    return model


def quantized_parts(path):
    model = Config.fromfile(path).model
    return {k for k, v in model.items() if isinstance(v, dict) and 'Quant' in str(v.get('type'))}


@pytest.mark.parametrize('stem, end', [(TINY, 'synthetic'), (FULL, 'nus-3d')])
def test_each_branch_has_its_switch(stem, end):
    camera = quantized_parts(f'{stem}_int8_{end}.py')
    assert camera == ALL_BUT_LIDAR
    assert quantized_parts(f'{stem}_int8-lidar_{end}.py') == {'pts_middle_encoder'}
    assert quantized_parts(f'{stem}_int8-all_{end}.py') == camera | {'pts_middle_encoder'}
    changed = Config.fromfile(f'{stem}_int8-all_{end}.py')
    changed.model.pts_middle_encoder.type = 'BEVFusionSparseEncoder'
    assert changed.to_dict() == Config.fromfile(f'{stem}_int8_{end}.py').to_dict()


def test_the_config_of_training_only_adds_the_encoder():
    one = Config.fromfile(f'{TINY}_qat_synthetic.py').to_dict()
    other = Config.fromfile(f'{TINY}_qat-all_synthetic.py').to_dict()
    assert {k for k in one if one[k] != other[k]} == {'model', 'load_from', 'custom_hooks'}
    taught = other['custom_hooks'][1]['modules']
    assert taught.keys() - one['custom_hooks'][1]['modules'].keys() == {'pts_middle_encoder'}
    assert other['custom_hooks'][1]['checkpoint'] == other['load_from']


def features(model, batch):
    """Map of each branch, and of both."""
    found = {}
    handles = [
        getattr(model, part).register_forward_hook(
            lambda _, inputs, out, name=name: found.setdefault(name, out)
        )
        for name, part in BRANCHES.items()
    ]
    with torch.no_grad():
        boxes = model.test_step(batch)[0].pred_instances_3d
    for handle in handles:
        handle.remove()
    return found, boxes


def sqnr(exact, found):
    exact, error = exact.double(), (exact - found).double()
    return 10 * math.log10(exact.square().sum() / error.square().sum())


def test_the_tiny_detector_calibrates_and_runs_with_both_branches_quantized(tmp_path):
    cfg = fc.read_config(f'{TINY}_int8-all_synthetic.py')
    cfg.merge_from_dict(frame_settings(cfg, make_frame(tmp_path / 'frame')))
    model = tiny('int8-all')
    (batch,) = fc.build_calibration_loader(cfg)[1]
    result = mq.calibrate(model, [batch], ['mse', 'pts_middle_encoder=percentile:99.99'])
    assert not modes.uncalibrated(model)
    lidar = [r for r in result.ranges if r.name.startswith('pts_middle_encoder')]
    assert len(lidar) > 10 and {r.method for r in lidar} == {'percentile:99.99'}
    assert {n.rpartition('.')[0] for n in result.kept_float} == {'pts_middle_encoder.conv_input.0'}
    found, boxes = features(model, batch)
    with mq.set_mode(model, 'float'):
        exact, _ = features(model, batch)
    assert len(boxes.scores_3d) > 0 and torch.isfinite(boxes.bboxes_3d.tensor).all()
    for name in BRANCHES:
        assert 15 < sqnr(exact[name], found[name]) < 60, name

    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'int8.pth')
    again = fc.build_model(cfg)
    fc.load_weights(again, tmp_path / 'int8.pth', calibrated=True)
    assert all(torch.equal(features(again, batch)[0][n], found[n]) for n in BRANCHES)


def scan(count=1500):
    torch.manual_seed(0)
    low, high = torch.tensor([-36.0, -36, -4.5, 0, 0]), torch.tensor([36.0, 36, 2.5, 255, 0.5])
    return low + torch.rand(count, 5) * (high - low)


CLOUDS = {
    'none': torch.zeros(0, 5),
    'one': torch.tensor([[3.0, 4.0, 0.0, 20.0, 0.0]]),
    'out of range': scan(50) + 900,
    'half of them out of range': torch.cat([scan(50), scan(50) + 900]),
}


@pytest.fixture(scope='module')
def lidar():
    """The tiny detector with its LiDAR encoder calibrated, as a function of clouds."""
    model = tiny('int8-lidar')

    def branch(*clouds):
        with torch.no_grad():
            return model.extract_pts_feat(dict(points=list(clouds)))

    mq.calibrate(model.pts_middle_encoder, [scan()], forward=lambda _, cloud: branch(cloud))
    return model, branch


@pytest.mark.parametrize('name', CLOUDS)
def test_odd_clouds(name, lidar):
    model, branch = lidar
    out = branch(CLOUDS[name], scan())
    assert out.shape == (2, 96, 72, 72) and torch.isfinite(out).all()
    assert out[0].eq(0).all() == (name in ('none', 'out of range'))
    with mq.set_mode(model, 'float'):
        exact = branch(CLOUDS[name], scan())
    assert sqnr(exact[1], out[1]) > 15
    assert torch.equal(out[1:], branch(scan()))


@pytest.mark.slow
@on_real_frame
def test_both_branches_of_the_full_model_on_a_real_frame(capsys):
    """Random weights, norms that have seen the frame: what rounding costs, branch by branch."""
    cfg = fc.read_config(f'{FULL}_int8-all_nus-3d.py')
    cfg.merge_from_dict(frame_settings(cfg, real_frame()))
    torch.manual_seed(0)
    model = fc.build_model(cfg)
    (batch,) = fc.build_calibration_loader(cfg)[1]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with mq.set_mode(model, 'float'):
        features(model, batch)
    for norm in norms:
        norm.eval()
    mq.calibrate(model, [batch])
    found, _ = features(model, batch)
    with mq.set_mode(model, 'float'):
        exact, _ = features(model, batch)
    lines = [f'{name}: {sqnr(exact[name], found[name]):.1f} dB' for name in BRANCHES]
    layers = sum(isinstance(m, QuantLayer) for m in model.pts_middle_encoder.modules())
    with capsys.disabled():
        print('\nall quantized against float, one real frame:', ', '.join(lines))
    assert layers == 21
    assert all(10 < sqnr(exact[name], found[name]) < 60 for name in BRANCHES)
