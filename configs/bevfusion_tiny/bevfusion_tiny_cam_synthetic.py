# The tiny BEVFusion with cameras alone: depth is estimated from the images. From random weights
# it does not leave the ground in the time that the others take, so it starts from the fusion model,
# and LiDAR points teach it depth; once trained it needs none, and is an LSSTransform.
_base_ = ['./bevfusion_tiny_lidar-cam_synthetic.py']

model = dict(
    data_preprocessor=dict(voxelize_cfg=None),
    view_transform=dict(type='DepthSupervisedLSSTransform'),
    pts_voxel_encoder=None,
    pts_middle_encoder=None,
    fusion_layer=None,
    pts_backbone=dict(in_channels=32),
)

modality = dict(use_lidar=False, use_camera=True)
train_pipeline = (
    [_base_.load_images] + _base_.load_points + _base_.load_boxes + [_base_.train_images]
    + _base_.move_scene + _base_.boxes_in_range + _base_.pack
)  # yapf: disable
pack = [dict(_base_.pack[0], keys=['img', 'gt_bboxes_3d', 'gt_labels_3d'])]
test_pipeline = [_base_.load_images, _base_.test_images] + pack

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, modality=modality))
test_dataloader = val_dataloader
calib_dataloader = val_dataloader

max_epochs = 3
train_cfg = dict(max_epochs=max_epochs, val_interval=3)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], T_max=max_epochs, end=max_epochs),
]
optim_wrapper = dict(optimizer=dict(lr=1e-3))
load_from = 'work_dirs/bevfusion_tiny_lidar-cam_synthetic/epoch_4.pth'
