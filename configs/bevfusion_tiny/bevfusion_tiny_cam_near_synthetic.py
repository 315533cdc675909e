# A tiny BEVFusion with cameras alone that sees what it detects: objects within 18 m, a fine map,
# depth bins of half a metre. In training LiDAR points teach it depth and class.
#   python tools/train.py configs/bevfusion_tiny/bevfusion_tiny_cam_near_synthetic.py --amp \
#       --cfg-options model.view_transform.class_weight=1.0 model.view_transform.loss_weight=0.5
_base_ = ['./bevfusion_tiny_cam_synthetic.py']

# Metres. 38.4 / 0.2 = 192 voxels along x and y; one map cell per 4 voxels (0.8 m), for both
# sensors.
point_cloud_range = [-19.2, -19.2, -5.0, 19.2, 19.2, 3.0]
voxel_size = [0.2, 0.2, 0.25]
grid_size = [192, 192, 33]
post_center_range = [-20.0, -20.0, -10.0, 20.0, 20.0, 10.0]
place = dict(pc_range=point_cloud_range[:2], voxel_size=voxel_size[:2])

model = dict(
    view_transform=dict(
        xbound=[-19.2, 19.2, 0.4],
        ybound=[-19.2, 19.2, 0.4],
        dbound=[1.0, 23.0, 0.5],
    ),
    bbox_head=dict(
        train_cfg=dict(
            point_cloud_range=point_cloud_range, grid_size=grid_size, voxel_size=voxel_size
        ),
        test_cfg=dict(grid_size=grid_size, **place),
        bbox_coder=dict(post_center_range=post_center_range, **place),
    ),
)

# The images have 352 x 198 pixels; the sky is cut off. They and the scene are moved little.
data_root = 'data/synthetic_near/'
train_images = dict(
    _base_.train_images, resize_lim=[0.96, 1.12], rot_lim=[-2.0, 2.0], rand_flip=False
)
test_images = dict(train_images, resize_lim=[1.0, 1.0], rot_lim=[0.0, 0.0], is_train=False)
load_points = [_base_.load_points[0]]
move_scene = [dict(type='BEVFusionRandomFlip3D')]
boxes_in_range = [
    dict(type='ObjectRangeFilter', point_cloud_range=point_cloud_range),
    _base_.boxes_in_range[1],
]
train_keys = ['img', 'points', 'gt_bboxes_3d', 'gt_labels_3d']
train_pipeline = (
    [_base_.load_images] + load_points + _base_.load_boxes + [dict(type='LabelPoints')]
    + [train_images] + move_scene + boxes_in_range + [dict(_base_.pack[0], keys=train_keys)]
)  # yapf: disable
test_pipeline = [_base_.load_images, test_images] + _base_.pack

train_dataloader = dict(dataset=dict(pipeline=train_pipeline, data_root=data_root))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, data_root=data_root))
test_dataloader = val_dataloader
calib_dataloader = dict(dataset=dict(pipeline=test_pipeline, data_root=data_root))
val_evaluator = dict(data_root=data_root, ann_file=data_root + 'nuscenes_infos_val.pkl')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=1e-3))
max_epochs = 3
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], T_max=max_epochs, end=max_epochs),
]
load_from = 'checkpoints/bevfusion_tiny_cam_synthetic.pth'
