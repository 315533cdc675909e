"""`type='Quant'` of whole detectors: every part, ties between them, what stays float and why."""

import copy

import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.registry import DefaultScope
from torch import nn

from mmdet3d_quant import calibrate, quantizers, set_mode, ties
from mmdet3d_quant.core.copies import tensors
from mmdet3d_quant.core.coverage import coverage
from mmdet3d_quant.models.convert import quantize_parts

PILLARS = dict(
    type='VoxelNet',
    data_preprocessor=dict(type='Det3DDataPreprocessor'),
    voxel_encoder=dict(
        type='PillarFeatureNet',
        in_channels=4,
        feat_channels=[8],
        with_distance=False,
        voxel_size=[1, 1, 4],
        point_cloud_range=[0, -8, -3, 16, 8, 1],
    ),
    middle_encoder=dict(type='PointPillarsScatter', in_channels=8, output_shape=[16, 16]),
    backbone=dict(
        type='SECOND',
        in_channels=8,
        out_channels=[16, 16],
        layer_nums=[1, 1],
        layer_strides=[1, 2],
    ),
    neck=dict(
        type='SECONDFPN', in_channels=[16, 16], out_channels=[16, 16], upsample_strides=[1, 2]
    ),
    bbox_head=dict(
        type='Anchor3DHead',
        num_classes=1,
        in_channels=32,
        feat_channels=32,
        use_direction_classifier=True,
        anchor_generator=dict(
            type='Anchor3DRangeGenerator',
            ranges=[[0, -8, -1, 16, 8, -1]],
            sizes=[[3.9, 1.6, 1.56]],
            rotations=[0, 1.57],
        ),
        bbox_coder=dict(type='DeltaXYZWLHRBBoxCoder'),
        loss_cls=dict(type='mmdet.FocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='mmdet.SmoothL1Loss'),
        loss_dir=dict(type='mmdet.CrossEntropyLoss'),
    ),
)


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmdet3d'):
        yield


def built(**more):
    cfg = copy.deepcopy(PILLARS)
    model = MODELS.build(dict(cfg, type='Quant', of=cfg['type'], **more))
    model.eval()
    return model


def batch(seed=0):
    rng = torch.Generator().manual_seed(seed)
    coors = torch.randint(0, 16, (60, 4), generator=rng)
    coors[:, :2] = 0
    points = torch.rand(60, 5, 4, generator=rng)
    voxels = dict(voxels=points, num_points=torch.full((60,), 5), coors=coors.unique(dim=0))
    return dict(voxels={k: v[: len(voxels['coors'])] for k, v in voxels.items()})


def run(model, inputs):
    return model(inputs, mode='tensor')


def test_one_line_quantizes_a_detector():
    torch.manual_seed(0)
    floating = MODELS.build(copy.deepcopy(PILLARS))
    floating.eval()
    torch.manual_seed(0)
    model = built()
    state = model.state_dict()
    assert [k for k in state if not k.endswith('._amax')] == list(floating.state_dict())
    with torch.no_grad():
        wanted = list(tensors(run(floating, batch())))
        with set_mode(model, 'float'):
            found = list(tensors(run(model, batch())))
        assert all(map(torch.equal, wanted, found))
        told = calibrate(model, [batch()], 'max', run).coverage
        for a, b in zip(wanted, tensors(run(model, batch()))):
            assert 0 < float((a - b).norm() / a.norm()) < 0.1
    assert told.share > 0.95
    (line,) = told.lines()
    assert line.startswith('float: voxel_encoder.pfn_layers.0.linear (1 layer, ')
    assert 'offsets of the points' in line


def test_readers_in_other_parts_share_a_scale():
    groups = [set(group) for group in ties(built())]
    reader = '{}._input_quantizer'.format
    assert {reader(f'bbox_head.conv_{n}') for n in ('cls', 'reg', 'dir_cls')} in groups
    assert {reader('backbone.blocks.1.0'), reader('neck.deblocks.0.0')} in groups


def test_all_heads_of_a_centerpoint_read_one_map_with_one_scale():
    tasks = [dict(num_class=1, class_names=['car']), dict(num_class=1, class_names=['bus'])]
    branches = dict(reg=(2, 2), height=(1, 2), dim=(3, 2))
    head = MODELS.build(
        dict(
            type='Quant',
            of='CenterHead',
            in_channels=8,
            share_conv_channel=8,
            tasks=tasks,
            common_heads=branches,
            separate_head=dict(type='SeparateHead', init_bias=-2.19, final_kernel=3),
            bbox_coder=dict(
                type='CenterPointBBoxCoder',
                post_center_range=[0] * 6,
                out_size_factor=4,
                voxel_size=[1, 1],
                pc_range=[0, 0],
                code_size=9,
            ),
        )
    )
    largest = max(ties(head), key=len)
    assert len(largest) == len(tasks) * (len(branches) + 1)  # and the heatmap
    assert all(n.endswith('.0.conv._input_quantizer') for n in largest)


def test_settings_reach_every_part():
    model = built(skip={'neck.deblocks.1': 'why'}, learn_amax=True)
    by_name = quantizers(model)
    assert by_name['neck.deblocks.1.0._input_quantizer'].float_reason == 'why'
    assert by_name['bbox_head.conv_cls._input_quantizer'].learned
    label = by_name['backbone.blocks.0.0._input_quantizer'].label
    assert label == 'VoxelNet: backbone.blocks.0.0._input_quantizer'
    only = built(only='backbone')
    assert {k.name.partition('.')[0] for k in coverage(only).quantized} == {'backbone'}


@pytest.mark.parametrize(
    'more, text',
    [
        (dict(example=dict(nek=[(1, 3, 4, 4)])), "'nek' is no part.*backbone"),
        (dict(example=[(1, 3, 4, 4)]), 'a dict such as'),
        (dict(example=dict(neck=[(1, 3, 4, 4)])), 'SECONDFPN cannot be run'),
        (dict(only='voxel_encoder'), 'cannot be quantized: the offsets of the points'),
    ],
)
def test_wrong_settings_are_told(more, text):
    with pytest.raises(ValueError, match=text):
        built(**more)


def test_parts_of_quantized_types_stay_what_they_are_and_are_tied():
    cfg = copy.deepcopy(PILLARS)
    cfg['backbone']['type'] = 'QuantSECOND'
    model = MODELS.build(dict(cfg, type='Quant', of=cfg['type']))
    assert type(model.backbone).__name__ == 'QuantSECOND'
    pair = {'backbone.blocks.1.0._input_quantizer', 'neck.deblocks.0.0._input_quantizer'}
    assert pair in map(set, ties(model))


def test_a_sparse_encoder_becomes_the_type_written_for_it():
    cfg = copy.deepcopy(PILLARS)
    cfg['voxel_encoder'] = dict(type='HardSimpleVFE')
    cfg['middle_encoder'] = dict(type='SparseEncoder', in_channels=4, sparse_shape=[41, 16, 16])
    model = MODELS.build(dict(cfg, type='Quant', of=cfg['type']))
    assert type(model.middle_encoder).__name__ == 'QuantSparseEncoder'
    floating = MODELS.build(cfg)
    keys = [k for k in model.state_dict() if not k.endswith('._amax')]
    assert keys == list(floating.state_dict())


class Picky(nn.Module):
    """A neck that wants more than maps."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x, matrices):
        return self.conv(x) * matrices


def test_a_part_that_cannot_be_run_stays_float_and_says_so():
    model = nn.Module()
    model.backbone, model.neck = nn.Sequential(nn.Conv2d(3, 4, 1)), Picky()
    left = quantize_parts(model).left
    assert list(left) == ['neck.conv']
    assert 'Picky cannot be run to see where its tensors meet' in left['neck.conv']
    assert "argument: 'matrices'" in coverage(model).lines()[0]
    again = nn.Module()
    again.neck = Picky()
    assert not quantize_parts(again, example=dict(neck=[(1, 4, 8, 8), (1, 4, 8, 8)])).left
