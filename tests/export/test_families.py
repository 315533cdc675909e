"""The files of mmdet3d's own detectors: what they are called, and that they compute the same."""

import json

import numpy as np
import pytest
import torch
from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes
from torch import Tensor

from mmdet3d_quant import calibrate
from mmdet3d_quant.check.chains import restored
from mmdet3d_quant.check.detector import engine_detector
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.engines import ONNXRuntime
from mmdet3d_quant.export import (
    ExportError,
    capture_inputs,
    detector_cuts,
    export_suite,
    generate_inputs,
)
from mmdet3d_quant.export.families import predictions
from tests.zoo import small_zoo

#: Height and width of images; a level of one cell is too little for a group norm.
IMAGE = dict(fcos3d=(64, 96), smoke=(32, 64), imvoxelnet=(64, 96))
LEVEL = ('cls_score{}', 'bbox_pred{}', 'dir_cls_pred{}')
MONO = (*LEVEL, 'attr_pred{}', 'centerness{}')
FILES = {
    'pointpillars': {'lidar.detector': ('bev', LEVEL, 1)},
    'centerpoint': {'lidar.detector': ('bev', LEVEL, 1)},
    'fpn': {'lidar.detector': ('bev', LEVEL, 3)},
    'fcos3d': {'camera.detector': ('input', MONO, 3)},
    'smoke': {'camera.detector': ('input', ('cls_score', 'bbox_pred'), 1)},
    'imvoxelnet': {
        'camera.backbone': ('img', ('feature{}',), 1),
        'volume.detector': ('volume', LEVEL, 1),
    },
}
#: Deformable convolutions left out.
CHANGES = dict(smoke=dict(neck=dict(use_dcn=False)))


def quiet(model, folder, inputs, **options):
    return export_suite(model, inputs, folder, {}, tell=lambda name: None, **options)


@pytest.mark.parametrize('name', FILES)
def test_float_files_compute_what_the_modules_do(name, tmp_path):
    model = small_zoo(name, **CHANGES.get(name, {}))
    inputs = generate_inputs(model, image_size=IMAGE.get(name))
    cuts, manifest = quiet(model, tmp_path, inputs, quantized=False)
    assert [cut.name for cut in cuts] == list(FILES[name])
    for cut in cuts:
        source, outputs, levels = FILES[name][cut.name]
        wanted = dict.fromkeys(o.format(i) for i in range(levels) for o in outputs)
        assert list(cut.inputs) == [source] and cut.output_names == tuple(wanted)
        entry = manifest['files'][f'{cut.name}.onnx']
        assert 'BatchNormalization' not in entry['nodes'] and entry['io'] == 'fp32:chw'
        found = ONNXRuntime(tmp_path / f'{cut.name}.onnx')({source: inputs[source].numpy()})
        with torch.no_grad():
            expected = cut.module(inputs[source])
        for key, value in strict_zip(cut.output_names, expected):
            torch.testing.assert_close(torch.from_numpy(found[key]), value, rtol=2e-3, atol=2e-3)


def test_the_predictions_are_those_of_the_detector():
    """Of anchors by level and of centres by task: names and back are what `forward` returns."""
    for name in ('fpn', 'centerpoint'):
        model = small_zoo(name)
        head, bev = model.pts_bbox_head, generate_inputs(model)['bev']
        with torch.no_grad():
            returned = head(model.pts_neck(model.pts_backbone(bev)))
        named = dict(predictions(head, returned))
        for x, y in strict_zip(returned, restored(head, named)):
            for one, other in strict_zip(x, y):
                pair = [v if isinstance(v, dict) else {'': v} for v in (one, other)]
                assert pair[0].keys() == pair[1].keys()
                assert all(torch.equal(v, pair[1][k]) for k, v in pair[0].items())
    task = returned[1][0]  # CenterPoint's second of six: two classes of ten in all
    assert torch.equal(named['cls_score0'][:, 1:3], task['heatmap'])
    assert torch.equal(named['bbox_pred0'][:, 8:10], task['reg'])
    assert torch.equal(named['bbox_pred0'][:, 14:16], task['vel'])
    assert torch.equal(named['dir_cls_pred0'][:, 2:4], task['rot'])


def cloud():
    """One frame of points in the range of KITTI's pillars."""
    rng = torch.Generator().manual_seed(0)
    low, high = torch.tensor([0, -2.5, -3, 0]), torch.tensor([7.5, 2.5, 1, 1])
    points = low + torch.rand(2000, 4, generator=rng) * (high - low)
    sample = Det3DDataSample(metainfo=dict(box_type_3d=LiDARInstance3DBoxes))
    return dict(inputs=dict(points=[points]), data_samples=[sample])


def pillars(**changes):
    """A PointPillars whose grid is that of the small map."""
    bounds = [0, -2.56, -3, 7.68, 2.56, 1]
    model = small_zoo(
        'pointpillars',
        data_preprocessor=dict(voxel_layer=dict(point_cloud_range=bounds)),
        voxel_encoder=dict(point_cloud_range=bounds),
        test_cfg=dict(score_thr=0.0),
        **changes,
    )
    return model


INT8 = dict(backbone=dict(type='QuantSECOND'), neck=dict(type='QuantSECONDFPN'))


@pytest.mark.parametrize('int8', [False, True])
def test_a_detector_with_files_finds_the_boxes_of_the_model(int8, tmp_path):
    batch = cloud()
    model = pillars(**(INT8 if int8 else {}))
    if int8:
        calibrate(model, [batch])
    inputs = capture_inputs(model, batch)
    assert list(inputs) == ['bev'] and inputs['bev'].shape == (1, 8, 32, 48)
    quiet(model, tmp_path, inputs, quantized=int8)
    with torch.no_grad():
        wanted = model.test_step(batch)[0].pred_instances_3d
        found = engine_detector(model, tmp_path, ONNXRuntime).test_step(batch)[0].pred_instances_3d
    assert len(wanted) > 10
    # Rounding ties decide some of the last bits, and with them the order of equal scores.
    scores = np.sort(wanted.scores_3d), np.sort(found.scores_3d)
    assert np.abs(scores[0] - scores[1]).max() < (0.02 if int8 else 1e-4)


def test_a_quantized_detector_has_ties_between_backbone_and_neck(tmp_path):
    model = pillars(**INT8)
    calibrate(model, [cloud()])
    _, manifest = quiet(model, tmp_path, generate_inputs(model))
    groups = [set(group['quantizers']) for group in manifest['scales']]
    assert {'backbone.blocks.1.0._input_quantizer', 'neck.deblocks.0.0._input_quantizer'} in groups
    assert manifest['files']['lidar.detector.onnx']['quantizers']['unused'] == []
    script = (tmp_path / 'build_engines.sh').read_text()
    assert '--inputIOFormats=fp32:chw' in script and 'fp16:chw' not in script
    assert 'CUDA-BEVFusion' not in (tmp_path / 'README.md').read_text()
    assert json.loads((tmp_path / 'manifest.json').read_text()) == manifest


def test_operators_that_onnx_lacks_are_named_and_refused_or_allowed(tmp_path):
    dcn = dict(type='DCNv2', deform_groups=1, fallback_on_stride=False)
    model = small_zoo(
        'imvoxelnet',
        backbone=dict(depth=50, dcn=dcn, stage_with_dcn=(False, False, False, True)),
        neck=dict(in_channels=[32, 64, 128, 256]),
    )
    inputs = generate_inputs(model, image_size=IMAGE['imvoxelnet'])
    only = ('camera.backbone',)
    with pytest.raises(ExportError, match='MMCVModulatedDeformConv2d at /backbone/layer4') as err:
        quiet(model, tmp_path, inputs, quantized=False, only=only)
    assert 'and 2 more' in str(err.value) and '--allow-custom-ops' in str(err.value)
    assert not (tmp_path / 'camera.backbone.onnx').exists()
    _, manifest = quiet(model, tmp_path, inputs, quantized=False, only=only, custom_ops=True)
    entry = manifest['files']['camera.backbone.onnx']
    assert entry['custom_ops'] == {'mmcv::MMCVModulatedDeformConv2d': 3}
    assert entry['nodes']['BatchNormalization'] == 3  # those that read them stay, in float
    assert len(entry['batch_norm']) == 3
    assert 'libmmdeploy_tensorrt_ops.so' in (tmp_path / 'build_engines.sh').read_text()


def test_a_head_of_no_row_stays_out_and_the_features_come_out():
    model = small_zoo('fpn')
    head = torch.nn.Identity()
    model.pts_bbox_head = head
    (cut,) = detector_cuts(model, generate_inputs(model))
    assert cut.output_names == ('feature0', 'feature1', 'feature2')
    assert all(isinstance(x, Tensor) for x in cut.module(*cut.inputs.values()))


def test_what_is_not_known_is_asked_for():
    with pytest.raises(QuantError, match='--image-size'):
        generate_inputs(small_zoo('fcos3d'))
    model = small_zoo('pointpillars')
    model.middle_encoder = torch.nn.Identity()
    with pytest.raises(QuantError, match='Identity, whose map has no known shape'):
        generate_inputs(model)
