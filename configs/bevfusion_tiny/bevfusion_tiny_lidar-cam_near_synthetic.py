# A tiny BEVFusion that needs its cameras: near objects, and a LiDAR that returns few points. It
# starts from the near model with cameras alone.
#   python tools/train.py configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_near_synthetic.py --amp
_base_ = ['./bevfusion_tiny_cam_near_synthetic.py']

model = dict(
    data_preprocessor=dict(
        voxelize_cfg=dict(
            _delete_=True,
            max_num_points=10,
            point_cloud_range=_base_.point_cloud_range,
            voxel_size=_base_.voxel_size,
            max_voxels=[60000, 60000],
            voxelize_reduce=True,
        )
    ),
    pts_voxel_encoder=dict(_delete_=True, type='HardSimpleVFE', num_features=5),
    pts_middle_encoder=dict(
        _delete_=True,
        type='BEVFusionSparseEncoder',
        in_channels=5,
        sparse_shape=_base_.grid_size,
        order=('conv', 'norm', 'act'),
        norm_cfg=dict(type='BN1d', eps=1e-3, momentum=0.01),
        base_channels=16,
        output_channels=32,
        encoder_channels=((16, 32), (32, 48), (48,)),
        encoder_paddings=((0, 1), (0, (1, 1, 0)), (0,)),
        block_type='basicblock',
    ),
    fusion_layer=dict(_delete_=True, type='ConvFuser', in_channels=[32, 96], out_channels=64),
    pts_backbone=dict(in_channels=64),
)

modality = dict(use_lidar=True, use_camera=True)
load_points = [
    _base_.load_points[0],
    dict(type='PointsRangeFilter', point_cloud_range=_base_.point_cloud_range),
    dict(type='PointSample', num_points=1024),
]
train_pipeline = (
    [_base_.load_images] + load_points + _base_.load_boxes + [_base_.train_images]
    + _base_.move_scene + _base_.boxes_in_range + [dict(_base_.pack[0], keys=_base_.train_keys)]
)  # yapf: disable
test_pipeline = (
    [_base_.load_images]
    + load_points
    + [_base_.test_images]
    + [dict(_base_.pack[0], keys=_base_.train_keys)]
)

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, modality=modality))
test_dataloader = val_dataloader
calib_dataloader = val_dataloader

max_epochs = 2
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], T_max=max_epochs, end=max_epochs),
]
load_from = 'checkpoints/bevfusion_tiny_cam_near_synthetic.pth'
