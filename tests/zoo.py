"""Detectors of mmdet3d's own config files, made narrow."""

import copy
from pathlib import Path

import mmdet3d
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope

#: The configs in mmdet3d's wheel.
ZOO = Path(mmdet3d.__file__).parent / '.mim' / 'configs'
SECOND = dict(in_channels=8, layer_nums=[1, 1, 1], out_channels=[8, 16, 16])
SECONDFPN = dict(in_channels=[8, 16, 16], out_channels=[8, 8, 8])
RESNET = dict(depth=18, base_channels=8, style='pytorch', init_cfg=None)
#: By name: a base config of the zoo, and what makes it small.
SMALL = {
    'pointpillars': (
        '_base_/models/pointpillars_hv_secfpn_kitti.py',
        dict(
            voxel_encoder=dict(feat_channels=[8]),
            middle_encoder=dict(in_channels=8, output_shape=[32, 48]),
            backbone=SECOND,
            neck=SECONDFPN,
            bbox_head=dict(in_channels=24, feat_channels=24),
        ),
    ),
    'centerpoint': (
        '_base_/models/centerpoint_pillar02_second_secfpn_nus.py',
        dict(
            data_preprocessor=dict(voxel_layer=dict(point_cloud_range=[-5, -3, -5, 5, 3, 3])),
            pts_voxel_encoder=dict(feat_channels=[8], point_cloud_range=[-5, -3, -5, 5, 3, 3]),
            pts_middle_encoder=dict(in_channels=8, output_shape=[32, 48]),
            pts_backbone=SECOND,
            pts_neck=SECONDFPN,
            pts_bbox_head=dict(
                in_channels=24, share_conv_channel=8, bbox_coder=dict(pc_range=[-5, -3])
            ),
        ),
    ),
    'fpn': (
        '_base_/models/pointpillars_hv_fpn_nus.py',
        dict(
            pts_voxel_encoder=dict(feat_channels=[8, 8]),
            pts_middle_encoder=dict(in_channels=8, output_shape=[32, 48]),
            pts_backbone=SECOND,
            pts_neck=dict(in_channels=[8, 16, 16], out_channels=16),
            pts_bbox_head=dict(in_channels=16, feat_channels=16),
        ),
    ),
    'fcos3d': (
        '_base_/models/fcos3d.py',
        dict(
            backbone=dict(RESNET, frozen_stages=-1),
            neck=dict(in_channels=[8, 16, 32, 64], out_channels=32, num_outs=3),
            bbox_head=dict(
                strides=[8, 16, 32],
                in_channels=32,
                feat_channels=32,
                stacked_convs=1,
                cls_branch=(32,),
                reg_branch=((32,), (32,), (32,), (32,), ()),
                dir_branch=(32,),
                attr_branch=(32,),
                dcn_on_last_conv=False,
            ),
        ),
    ),
    'smoke': ('_base_/models/smoke.py', dict(backbone=dict(init_cfg=None))),
    'imvoxelnet': (
        'imvoxelnet/imvoxelnet_8xb4_kitti-3d-car.py',
        dict(
            backbone=dict(RESNET, frozen_stages=-1),
            neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
            neck_3d=dict(in_channels=16, out_channels=16),
            bbox_head=dict(in_channels=16, feat_channels=16),
            n_voxels=[16, 16, 12],
        ),
    ),
}


def small_model(name, **changes):
    """The config of ``model`` of a small detector."""
    path, narrow = SMALL[name]
    cfg = Config.fromfile(ZOO / path)
    cfg.merge_from_dict(dict(model=copy.deepcopy(narrow)))
    cfg.merge_from_dict(dict(model=changes))
    return cfg.model.to_dict()


def small_zoo(name, **changes):
    """A small detector with random weights, in eval mode."""
    init_default_scope('mmdet3d')
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(small_model(name, **changes)))
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose2d)):
            torch.nn.init.kaiming_normal_(module.weight)
    model.eval()
    return model
