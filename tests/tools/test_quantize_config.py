"""From a float config of mmdet3d to checked INT8 files, by the tools alone."""

import json
import sys

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.data.samples import frame_settings, make_frame
from mmdet3d_quant.files.checkpoint import read_checkpoint
from tests.small import INT8, ROOT, save_float, small_float_config
from tests.zoo import small_model

sys.path.insert(0, str(ROOT / 'tools'))
import calibrate  # noqa: E402
import export_onnx  # noqa: E402
import quantize_config  # noqa: E402

BOUNDS = [-38.4, -25.6, -5, 38.4, 25.6, 3]


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder with a float PointPillars, its INT8 config, both checkpoints and a frame of data."""
    folder = tmp_path_factory.mktemp('pillars')
    size = [1.6, 1.6, 8]
    model = small_model(
        'pointpillars',
        data_preprocessor=dict(voxel_layer=dict(point_cloud_range=BOUNDS, voxel_size=size)),
        voxel_encoder=dict(point_cloud_range=BOUNDS, voxel_size=size),
    )
    steps = [
        dict(type='LoadPointsFromFile', coord_type='LIDAR', load_dim=5, use_dim=4),
        dict(type='Pack3DDetInputs', keys=['points']),
    ]
    cfg = dict(
        model=model,
        default_scope='mmdet3d',
        test_dataloader=dict(
            dataset=dict(
                type='NuScenesDataset',
                metainfo=dict(classes=['car', 'truck', 'bus']),
                modality=dict(use_lidar=True, use_camera=False),
                test_mode=True,
                box_type_3d='LiDAR',
                pipeline=steps,
            )
        ),
    )
    cfg.update(frame_settings(cfg, make_frame(folder / 'frame')))
    Config(cfg).dump(folder / 'float.py')
    save_float(folder / 'float.py', folder / 'float.pth')
    quantize_config.main([str(folder / 'float.py'), '-o', str(folder / 'int8.py')])
    calibrate.main(
        [str(folder / n) for n in ('int8.py', 'float.pth')] + ['--out', f'{folder}/q.pth']
    )
    return folder


def export(work, out, *options):
    args = [str(work / 'int8.py'), str(work / 'q.pth'), '--out-dir', str(out), '--no-compile']
    return export_onnx.main([*args, *options])


def test_the_files_agree_with_the_model_on_real_points(work, tmp_path):
    results = export(work, tmp_path)
    assert [r.output for r in results] == ['cls_score0', 'bbox_pred0', 'dir_cls_pred0']
    assert all(r.onnxruntime > 60 or r.onnxruntime > r.fake_quant + 3 for r in results)
    manifest = json.loads((tmp_path / 'manifest.json').read_text())
    assert list(manifest['files']) == ['lidar.detector.onnx']
    reasons = {group['module']: group['reason'] for group in manifest['coverage']['float']}
    assert 'would be lost in steps of INT8' in reasons['voxel_encoder.pfn_layers.0.linear']
    assert read_checkpoint(work / 'q.pth')['meta']['calibration']['num_batches'] == 1


def test_float_files_and_generated_inputs(work, tmp_path):
    for options in (('--float',), ('--inputs', 'generated', '--target', 'openvino')):
        export(work, tmp_path, *options)
        entry = json.loads((tmp_path / 'manifest.json').read_text())['files']['lidar.detector.onnx']
        assert entry['inputs']['bev']['shape'] == [1, 8, 32, 48]
        assert ('QuantizeLinear' in entry['nodes']) == (options[0] != '--float')


def test_data_are_wanted_where_they_are_asked_for(work, tmp_path):
    changes = ['--cfg-options', 'calib_dataloader.dataset.data_root=/nowhere']
    with pytest.raises(QuantError, match='/nowhere'):
        export(work, tmp_path, '--inputs', 'data', *changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_bevfusion_gets_the_types_of_our_own_configs_and_trains_on(tmp_path):
    """From the float config to a checkpoint of QAT, with what was written and no other config."""
    float_config = small_float_config(make_frame(tmp_path / 'frame'), tmp_path / 'float.py')
    save_float(float_config, tmp_path / 'float.pth')
    made = quantize_config.main([str(float_config), '-o', str(tmp_path / 'int8.py')])
    ours = Config.fromfile(INT8.with_name(INT8.name.replace('int8', 'int8-all'))).model
    found = Config.fromfile(made.int8).model
    assert found.type == ours.type == 'BEVFusion'
    for part in ('img_backbone', 'img_neck', 'view_transform', 'fusion_layer', 'pts_backbone',
                 'pts_neck', 'bbox_head'):  # fmt: skip
        assert found[part]['type'] == ours[part]['type']
    names = ('int8.py', 'float.pth')
    calibrate.main([str(tmp_path / n) for n in names] + ['--out', f'{tmp_path}/q.pth'])
    qat = Config.fromfile(made.qat)
    for when in ('val', 'test'):  # a single frame has no tables to score on
        qat.update({f'{when}_{what}': None for what in ('dataloader', 'evaluator', 'cfg')})
    qat.update(load_from=f'{tmp_path}/q.pth', work_dir=f'{tmp_path}/qat')
    qat.custom_hooks[1].checkpoint = qat.load_from
    Runner.from_cfg(qat).train()
    before, after = (read_checkpoint(tmp_path / n) for n in ('q.pth', 'qat/epoch_1.pth'))
    before, after = before['state_dict'], after['state_dict']
    assert before.keys() == after.keys()
    moved = [k for k, v in before.items() if k.endswith('weight') and not v.equal(after[k])]
    assert any(k.startswith('pts_backbone') for k in moved)
