# A tiny CenterPoint that is hard to quantize: near objects, one sweep, and a RegNet whose 3 x 3
# convolutions are all depthwise.
#   python tools/train.py configs/centerpoint_tiny/centerpoint_tiny_depthwise_synthetic.py --amp
_base_ = ['./centerpoint_tiny_synthetic.py']

# Metres. 38.4 / 0.2 = 192 pillars along x and y; one cell of the head per 4 pillars (0.8 m).
point_cloud_range = [-19.2, -19.2, -5.0, 19.2, 19.2, 3.0]
voxel_size = [0.2, 0.2, 8]
post_center_range = [-20.0, -20.0, -10.0, 20.0, 20.0, 10.0]
place = dict(pc_range=point_cloud_range[:2], voxel_size=voxel_size[:2])

model = dict(
    data_preprocessor=dict(
        voxel_layer=dict(voxel_size=voxel_size, point_cloud_range=point_cloud_range)
    ),
    pts_voxel_encoder=dict(voxel_size=voxel_size, point_cloud_range=point_cloud_range),
    pts_middle_encoder=dict(output_shape=(192, 192)),
    pts_backbone=dict(
        _delete_=True,
        type='mmdet.RegNet',
        arch=dict(w0=32, wa=12.0, wm=2.0, group_w=1, depth=9, bot_mul=1.0),
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        in_channels=32,
        stem_channels=32,
        base_channels=32,
        out_indices=(0, 1, 2),
        frozen_stages=-1,
        norm_cfg=_base_.norm,
        norm_eval=False,
    ),
    pts_bbox_head=dict(
        bbox_coder=dict(post_center_range=post_center_range, **place),
    ),
    train_cfg=dict(
        pts=dict(
            point_cloud_range=point_cloud_range, grid_size=[192, 192, 1], voxel_size=voxel_size
        )
    ),
    test_cfg=dict(pts=dict(post_center_limit_range=post_center_range, **place)),
)

data_root = 'data/synthetic_near/'
load_points = [_base_.load_points[0]]
move_scene = [
    dict(_base_.move_scene[0], rot_range=[-0.39269908, 0.39269908], translation_std=0.1),
    _base_.move_scene[1],
]
in_range = [dict(type='PointsRangeFilter', point_cloud_range=point_cloud_range)]
boxes_in_range = [
    dict(type='ObjectRangeFilter', point_cloud_range=point_cloud_range),
    _base_.boxes_in_range[1],
]
train_pipeline = (
    load_points + _base_.load_boxes + move_scene + in_range + boxes_in_range
    + [dict(type='PointShuffle')] + _base_.pack
)  # yapf: disable
test_pipeline = load_points + in_range + _base_.pack

train_dataloader = dict(dataset=dict(pipeline=train_pipeline, data_root=data_root))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, data_root=data_root))
test_dataloader = val_dataloader
calib_dataloader = val_dataloader
val_evaluator = dict(data_root=data_root, ann_file=data_root + 'nuscenes_infos_val.pkl')
test_evaluator = val_evaluator
