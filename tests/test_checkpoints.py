"""The trained weights that come with the project."""

import pytest
import torch
from mmengine.runner import Runner

import mmdet3d_quant as mq
from mmdet3d_quant.data.evaluation import Scorer, predict
from mmdet3d_quant.runs import from_config as fc
from tests.small import ROOT

FOLDER = ROOT / 'checkpoints'
CONFIGS = ROOT / 'configs/bevfusion_tiny'
FUSION = 'bevfusion_tiny_lidar-cam_synthetic'


@pytest.mark.parametrize('path', sorted(FOLDER.glob('*.pth')), ids=lambda p: p.stem)
def test_checkpoints_are_small_plain_and_fit_their_configs(path):
    assert path.stat().st_size <= 10e6
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint.keys() == {'state_dict', 'meta'} and checkpoint['meta']['seed'] == 0
    assert all(value.isfinite().all() for value in checkpoint['state_dict'].values())
    assert (FOLDER / 'logs' / f'{path.stem}.log').is_file()
    model = fc.build_model(fc.read_config(CONFIGS / f'{path.stem}.py'))
    fc.load_weights(model, path, calibrated=False)


def test_the_fusion_model_finds_objects_in_float_and_int8(tiny_nuscenes):
    """On two frames of validation scenes; untrained weights find nothing."""
    cfg = fc.read_config(CONFIGS / 'bevfusion_tiny_lidar-cam_int8_synthetic.py')
    for entry in ('val_dataloader', 'calib_dataloader'):
        cfg[entry].update(num_workers=0, persistent_workers=False, batch_size=2)
        cfg[entry].dataset.data_root = f'{tiny_nuscenes}/'
    evaluator = dict(cfg.val_evaluator, data_root=f'{tiny_nuscenes}/')
    evaluator['ann_file'] = f'{tiny_nuscenes}/nuscenes_infos_val.pkl'
    model = fc.build_model(cfg)
    fc.load_weights(model, FOLDER / f'{FUSION}.pth', calibrated=False)
    mq.calibrate(model, fc.build_calibration_loader(cfg)[1], 'mse')
    loader = Runner.build_dataloader(cfg.val_dataloader, seed=0)
    scorer = Scorer(evaluator, loader.dataset.metainfo)
    int8 = scorer.score(predict(model, loader))
    with mq.set_mode(model, 'float'):
        found = scorer.score(predict(model, loader))
    present = [name for name, of in found.matches.items() if of[0].positives.sum()]
    assert sum(found.ap[name] for name in present) / len(present) > 0.5
    assert abs(int8.mAP - found.mAP) < 0.1 and int8.ap != found.ap
