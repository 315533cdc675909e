# A BEVFusion that trains on a CPU: the architecture of configs/bevfusion in small, for the
# synthetic nuScenes of tools/make_synthetic_nuscenes.py. For the genuine one change `data_root`.
#   python tools/train.py configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_synthetic.py
_base_ = ['mmdet3d::_base_/default_runtime.py']
custom_imports = dict(
    imports=['mmdet3d_quant', 'mmdet3d_quant.bevfusion'], allow_failed_imports=False
)

# Metres. 72 / 0.25 = 288 voxels along x and y; one map cell per 4 voxels (1 m), for both sensors.
point_cloud_range = [-36.0, -36.0, -5.0, 36.0, 36.0, 3.0]
voxel_size = [0.25, 0.25, 0.25]
grid_size = [288, 288, 33]
out_size_factor = 4
image_size = [128, 352]

# The order decides the label numbers, and that of a checkpoint cannot be changed afterwards.
class_names = [
    'car', 'truck', 'construction_vehicle', 'bus', 'trailer', 'barrier', 'motorcycle',
    'bicycle', 'pedestrian', 'traffic_cone'
]  # yapf: disable

attention = dict(embed_dims=64, num_heads=4, dropout=0.1)
bev_norm = dict(type='BN', eps=1e-3, momentum=0.01)

model = dict(
    type='BEVFusion',
    data_preprocessor=dict(
        type='Det3DDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=False,  # the loader decodes to RGB
        pad_size_divisor=32,
        voxelize_cfg=dict(
            max_num_points=10,
            point_cloud_range=point_cloud_range,
            voxel_size=voxel_size,
            max_voxels=[60000, 60000],
            voxelize_reduce=True,
        ),
    ),
    img_backbone=dict(
        type='mmdet.ResNet',
        depth=50,
        base_channels=16,
        num_stages=4,
        out_indices=(1, 2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        style='pytorch',
    ),
    img_neck=dict(
        type='GeneralizedLSSFPN',
        in_channels=[128, 256, 512],
        out_channels=64,
        start_level=0,
        num_outs=3,
        norm_cfg=dict(type='BN2d', requires_grad=True),
        act_cfg=dict(type='ReLU', inplace=True),
        upsample_cfg=dict(mode='bilinear', align_corners=False),
    ),
    view_transform=dict(
        type='DepthLSSTransform',
        in_channels=64,
        out_channels=32,
        image_size=image_size,
        feature_size=[16, 44],
        xbound=[-36.0, 36.0, 0.5],
        ybound=[-36.0, 36.0, 0.5],
        zbound=[-10.0, 10.0, 20.0],
        dbound=[1.0, 49.0, 1.0],
        downsample=2,
    ),
    pts_voxel_encoder=dict(type='HardSimpleVFE', num_features=5),
    pts_middle_encoder=dict(
        type='BEVFusionSparseEncoder',
        in_channels=5,
        sparse_shape=grid_size,
        order=('conv', 'norm', 'act'),
        norm_cfg=dict(type='BN1d', eps=1e-3, momentum=0.01),
        base_channels=16,
        output_channels=32,
        encoder_channels=((16, 32), (32, 48), (48,)),
        encoder_paddings=((0, 1), (0, (1, 1, 0)), (0,)),
        block_type='basicblock',
    ),
    fusion_layer=dict(type='ConvFuser', in_channels=[32, 96], out_channels=64),
    pts_backbone=dict(
        type='SECOND',
        in_channels=64,
        out_channels=[48, 96],
        layer_nums=[3, 3],
        layer_strides=[1, 2],
        norm_cfg=bev_norm,
        conv_cfg=dict(type='Conv2d', bias=False),
    ),
    pts_neck=dict(
        type='SECONDFPN',
        in_channels=[48, 96],
        out_channels=[48, 48],
        upsample_strides=[1, 2],
        norm_cfg=bev_norm,
        upsample_cfg=dict(type='deconv', bias=False),
        use_conv_for_no_stride=True,
    ),
    bbox_head=dict(
        type='TransFusionHead',
        num_proposals=100,
        auxiliary=True,
        in_channels=96,
        hidden_channel=64,
        num_classes=len(class_names),
        nms_kernel_size=3,
        bn_momentum=0.1,
        num_decoder_layers=1,
        decoder_layer=dict(
            type='TransformerDecoderLayer',
            self_attn_cfg=attention,
            cross_attn_cfg=attention,
            ffn_cfg=dict(
                embed_dims=64,
                feedforward_channels=128,
                num_fcs=2,
                ffn_drop=0.1,
                act_cfg=dict(type='ReLU', inplace=True),
            ),
            norm_cfg=dict(type='LN'),
            pos_encoding_cfg=dict(input_channel=2, num_pos_feats=64),
        ),
        train_cfg=dict(
            dataset='nuScenes',
            point_cloud_range=point_cloud_range,
            grid_size=grid_size,
            voxel_size=voxel_size,
            out_size_factor=out_size_factor,
            gaussian_overlap=0.1,
            min_radius=1,
            pos_weight=-1,
            code_weights=[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2],
            assigner=dict(
                type='HungarianAssigner3D',
                iou_calculator=dict(type='BboxOverlaps3D', coordinate='lidar'),
                cls_cost=dict(type='mmdet.FocalLossCost', gamma=2.0, alpha=0.25, weight=0.15),
                reg_cost=dict(type='BBoxBEVL1Cost', weight=0.25),
                iou_cost=dict(type='IoU3DCost', weight=0.25),
            ),
        ),
        test_cfg=dict(
            dataset='nuScenes',
            grid_size=grid_size,
            out_size_factor=out_size_factor,
            voxel_size=voxel_size[:2],
            pc_range=point_cloud_range[:2],
            nms_type=None,
        ),
        common_heads=dict(center=[2, 2], height=[1, 2], dim=[3, 2], rot=[2, 2], vel=[2, 2]),
        bbox_coder=dict(
            type='TransFusionBBoxCoder',
            pc_range=point_cloud_range[:2],
            post_center_range=[-40.0, -40.0, -10.0, 40.0, 40.0, 10.0],
            score_threshold=0.0,
            out_size_factor=out_size_factor,
            voxel_size=voxel_size[:2],
            code_size=10,
        ),
        loss_cls=dict(
            type='mmdet.FocalLoss',
            use_sigmoid=True,
            gamma=2.0,
            alpha=0.25,
            reduction='mean',
            loss_weight=1.0,
        ),
        loss_heatmap=dict(type='mmdet.GaussianFocalLoss', reduction='mean', loss_weight=1.0),
        loss_bbox=dict(type='mmdet.L1Loss', reduction='mean', loss_weight=0.25),
    ),
)

dataset_type = 'NuScenesDataset'
data_root = 'data/synthetic/'
metainfo = dict(classes=class_names, version='v1.0-mini')
cameras = [
    'CAM_FRONT', 'CAM_FRONT_LEFT', 'CAM_FRONT_RIGHT', 'CAM_BACK', 'CAM_BACK_RIGHT',
    'CAM_BACK_LEFT'
]  # yapf: disable
data_prefix = dict(
    {camera: f'samples/{camera}' for camera in cameras},
    pts='samples/LIDAR_TOP',
    sweeps='sweeps/LIDAR_TOP',
)
modality = dict(use_lidar=True, use_camera=True)

load_images = dict(type='BEVLoadMultiViewImageFromFiles', color_type='color')
load_points = [
    dict(type='LoadPointsFromFile', coord_type='LIDAR', load_dim=5, use_dim=5),
    dict(
        type='LoadPointsFromMultiSweeps',
        sweeps_num=3,
        load_dim=5,
        use_dim=5,
        pad_empty_sweeps=True,
        remove_close=True,
        test_mode=True,  # the nearest in time, not random ones
    ),
]
load_boxes = [
    dict(type='LoadAnnotations3D', with_bbox_3d=True, with_label_3d=True, with_attr_label=False)
]
in_range = [dict(type='PointsRangeFilter', point_cloud_range=point_cloud_range)]
move_scene = [
    dict(
        type='BEVFusionGlobalRotScaleTrans',
        scale_ratio_range=[0.95, 1.05],
        rot_range=[-0.78539816, 0.78539816],
        translation_std=0.2,
    ),
    dict(type='BEVFusionRandomFlip3D'),
]
boxes_in_range = [
    dict(type='ObjectRangeFilter', point_cloud_range=point_cloud_range),
    dict(type='ObjectNameFilter', classes=class_names),
]
meta_keys = [
    'cam2img', 'ori_cam2img', 'lidar2cam', 'lidar2img', 'cam2lidar', 'ori_lidar2img',
    'img_aug_matrix', 'lidar_aug_matrix', 'box_type_3d', 'sample_idx', 'lidar_path', 'img_path',
    'num_pts_feats'
]  # yapf: disable
pack = [
    dict(
        type='Pack3DDetInputs',
        keys=['img', 'points', 'gt_bboxes_3d', 'gt_labels_3d'],
        meta_keys=meta_keys,
    )
]
# 704 x 396 pixels become 352 x 128: halved, and the sky cut off.
train_images = dict(
    type='ImageAug3D',
    final_dim=image_size,
    resize_lim=[0.44, 0.58],
    bot_pct_lim=[0.0, 0.0],
    rot_lim=[-5.4, 5.4],
    rand_flip=True,
    is_train=True,
)
test_images = dict(
    train_images, resize_lim=[0.5, 0.5], rot_lim=[0.0, 0.0], rand_flip=False, is_train=False
)

train_pipeline = (
    [load_images] + load_points + load_boxes + [train_images] + move_scene + in_range
    + boxes_in_range + [dict(type='PointShuffle')] + pack
)  # yapf: disable
test_pipeline = [load_images] + load_points + [test_images] + in_range + pack

train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='nuscenes_infos_train.pkl',
        pipeline=train_pipeline,
        metainfo=metainfo,
        modality=modality,
        data_prefix=data_prefix,
        use_valid_flag=True,
        test_mode=False,
        box_type_3d='LiDAR',
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=False,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='nuscenes_infos_val.pkl',
        pipeline=test_pipeline,
        metainfo=metainfo,
        modality=modality,
        data_prefix=data_prefix,
        test_mode=True,
        box_type_3d='LiDAR',
    ),
)
test_dataloader = val_dataloader
# Frames for choosing quantization ranges: the training split, processed as for testing.
calib_dataloader = dict(
    val_dataloader,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(val_dataloader['dataset'], ann_file='nuscenes_infos_train.pkl'),
)

val_evaluator = dict(
    type='NuScenesMetric',
    data_root=data_root,
    ann_file=data_root + 'nuscenes_infos_val.pkl',
    metric='bbox',
)
test_evaluator = val_evaluator

# As published, the LiDAR branch comes from the LiDAR-only model, which is to be trained first:
# bevfusion_tiny_lidar_synthetic.py.
load_from = 'work_dirs/bevfusion_tiny_lidar_synthetic/epoch_3.pth'
max_epochs = 4
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=2)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=35, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=200),
    dict(
        type='CosineAnnealingLR',
        begin=0,
        T_max=max_epochs,
        end=max_epochs,
        by_epoch=True,
        eta_min_ratio=1e-3,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=20),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
)
randomness = dict(seed=0)

vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='Det3DLocalVisualizer', vis_backends=vis_backends, name='visualizer')
