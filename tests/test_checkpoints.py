"""The trained weights that come with the project."""

import pytest
import torch
from mmengine.runner import Runner

import mmdet3d_quant as mq
from mmdet3d_quant.check.detector import engine_detector
from mmdet3d_quant.data.evaluation import Scorer, predict
from mmdet3d_quant.engines import make_engine
from mmdet3d_quant.export import capture_inputs, export_suite
from mmdet3d_quant.improve import BiasCorrection, EmptyCells
from mmdet3d_quant.runs import from_config as fc
from tests.small import ROOT

FOLDER = ROOT / 'checkpoints'
#: Detectors with an INT8 config and a QAT config beside the float one.
DETECTORS = (
    'bevfusion_tiny_lidar-cam',
    'bevfusion_tiny_lidar-cam_swin',
    'pointpillars_tiny',
    'centerpoint_tiny',
)
#: The same for near objects, which the small data set of the tests has too few of.
NEAR = (
    'bevfusion_tiny_cam_near',
    'bevfusion_tiny_lidar-cam_near',
    'centerpoint_tiny_depthwise',
)
PILLARS = ('pointpillars_tiny', 'centerpoint_tiny')


def config(stem):
    """The config of a name, from whichever folder has it."""
    (path,) = (ROOT / 'configs').glob(f'*_tiny/{stem}.py')
    return fc.read_config(path)


@pytest.mark.parametrize('path', sorted(FOLDER.glob('*.pth')), ids=lambda p: p.stem)
def test_checkpoints_are_small_plain_and_fit_their_configs(path):
    assert path.stat().st_size <= 10e6
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint.keys() == {'state_dict', 'meta'} and checkpoint['meta']['seed'] == 0
    assert all(value.isfinite().all() for value in checkpoint['state_dict'].values())
    assert (FOLDER / 'logs' / f'{path.stem}.log').is_file()
    model = fc.build_model(config(path.stem))
    fc.load_weights(model, path, calibrated=False)


@pytest.mark.parametrize('name', DETECTORS + NEAR)
def test_the_qat_config_takes_the_calibrated_model(name):
    """The same parts are quantized, and the hooks name modules that the model has."""
    cfg = config(f'{name}_qat_synthetic')
    model = fc.build_model(cfg)
    assert list(mq.quantizers(model)) == list(
        mq.quantizers(fc.build_model(config(f'{name}_int8_synthetic')))
    )
    named = [module for hook in cfg.custom_hooks for module in hook.get('modules', ())]
    assert named and set(named) <= {module for module, _ in model.named_modules()}


@pytest.mark.parametrize('name', DETECTORS)
def test_detectors_find_objects_in_float_int8_and_files(name, tiny_nuscenes, tmp_path):
    """On two frames of validation scenes; untrained weights find nothing."""
    cfg = config(f'{name}_int8_synthetic')
    for entry in ('val_dataloader', 'calib_dataloader'):
        cfg[entry].update(num_workers=0, persistent_workers=False, batch_size=2)
        cfg[entry].dataset.data_root = f'{tiny_nuscenes}/'
    evaluator = dict(cfg.val_evaluator, data_root=f'{tiny_nuscenes}/')
    evaluator['ann_file'] = f'{tiny_nuscenes}/nuscenes_infos_val.pkl'
    model = fc.build_model(cfg)
    fc.load_weights(model, FOLDER / f'{name}_synthetic.pth', calibrated=False)
    # as the comments of the configs say
    after = [EmptyCells(), BiasCorrection()] if name in PILLARS else []
    batches = fc.build_calibration_loader(cfg)[1]
    mq.calibrate(model, batches, 'mse', held_out=list(batches)[:1] if after else (), after=after)
    loader = Runner.build_dataloader(cfg.val_dataloader, seed=0)
    scorer = Scorer(evaluator, loader.dataset.metainfo)
    int8 = scorer.score(predict(model, loader))
    with mq.set_mode(model, 'float'):
        found = scorer.score(predict(model, loader))
    present = [n for n, of in found.matches.items() if of[0].positives.sum()]
    assert sum(found.ap[n] for n in present) / len(present) > 0.4
    assert abs(int8.mAP - found.mAP) < 0.1 and int8.ap != found.ap

    with torch.no_grad():
        inputs = capture_inputs(model, loader.collate_fn([loader.dataset[0]]))
    export_suite(model, inputs, tmp_path, {}, tell=lambda _: None)
    engines = engine_detector(model, tmp_path, lambda path: make_engine('onnxruntime', path, 1))
    assert abs(scorer.score(predict(engines, loader)).mAP - int8.mAP) < 0.05
