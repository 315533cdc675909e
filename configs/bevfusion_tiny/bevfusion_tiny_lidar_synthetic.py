# The tiny BEVFusion with LiDAR alone.
_base_ = ['./bevfusion_tiny_lidar-cam_synthetic.py']

model = dict(
    img_backbone=None,
    img_neck=None,
    view_transform=None,
    fusion_layer=None,
    pts_backbone=dict(in_channels=96),  # the encoder's 32 channels at 3 heights
)

modality = dict(use_lidar=True, use_camera=False)
train_pipeline = (
    _base_.load_points + _base_.load_boxes + _base_.move_scene + _base_.in_range
    + _base_.boxes_in_range + [dict(type='PointShuffle')] + _base_.pack
)  # yapf: disable
test_pipeline = _base_.load_points + _base_.in_range + _base_.pack

train_dataloader = dict(dataset=dict(pipeline=train_pipeline, modality=modality))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, modality=modality))
test_dataloader = val_dataloader
calib_dataloader = val_dataloader

max_epochs = 3
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], T_max=max_epochs, end=max_epochs),
]
load_from = None
