# A CenterPoint with pillars that trains on a CPU: the published architecture in small, on the LiDAR
# data of the tiny BEVFusion.
#   python tools/train.py configs/centerpoint_tiny/centerpoint_tiny_synthetic.py --amp
_base_ = ['../bevfusion_tiny/bevfusion_tiny_lidar_synthetic.py']

# Metres. 72 / 0.25 = 288 pillars along x and y; one cell of the head per 4 pillars (1 m).
point_cloud_range = _base_.point_cloud_range
voxel_size = [0.25, 0.25, 8]
norm = dict(type='BN', eps=1e-3, momentum=0.01)
tasks = [
    ['car'],
    ['truck', 'construction_vehicle'],
    ['bus', 'trailer'],
    ['barrier'],
    ['motorcycle', 'bicycle'],
    ['pedestrian', 'traffic_cone'],
]

model = dict(
    _delete_=True,
    type='CenterPoint',
    data_preprocessor=dict(
        type='Det3DDataPreprocessor',
        voxel=True,
        voxel_layer=dict(
            max_num_points=10,
            voxel_size=voxel_size,
            max_voxels=(30000, 40000),
            point_cloud_range=point_cloud_range,
        ),
    ),
    pts_voxel_encoder=dict(
        type='PillarFeatureNet',
        in_channels=5,
        feat_channels=[32],
        voxel_size=voxel_size,
        point_cloud_range=point_cloud_range,
        norm_cfg=dict(type='BN1d', eps=1e-3, momentum=0.01),
        legacy=False,
    ),
    pts_middle_encoder=dict(type='PointPillarsScatter', in_channels=32, output_shape=(288, 288)),
    pts_backbone=dict(
        type='SECOND',
        in_channels=32,
        out_channels=[32, 64, 128],
        layer_nums=[2, 3, 3],
        layer_strides=[2, 2, 2],
        norm_cfg=norm,
        conv_cfg=dict(type='Conv2d', bias=False),
    ),
    pts_neck=dict(
        type='SECONDFPN',
        in_channels=[32, 64, 128],
        out_channels=[32, 32, 32],
        upsample_strides=[0.5, 1, 2],
        norm_cfg=norm,
        upsample_cfg=dict(type='deconv', bias=False),
        use_conv_for_no_stride=True,
    ),
    pts_bbox_head=dict(
        type='CenterHead',
        in_channels=96,
        share_conv_channel=48,
        tasks=[dict(num_class=len(names), class_names=names) for names in tasks],
        common_heads=dict(reg=(2, 2), height=(1, 2), dim=(3, 2), rot=(2, 2), vel=(2, 2)),
        separate_head=dict(type='SeparateHead', head_conv=32, init_bias=-2.19, final_kernel=3),
        bbox_coder=dict(
            type='CenterPointBBoxCoder',
            pc_range=point_cloud_range[:2],
            post_center_range=[-40.0, -40.0, -10.0, 40.0, 40.0, 10.0],
            max_num=100,
            score_threshold=0.05,
            out_size_factor=4,
            voxel_size=voxel_size[:2],
            code_size=9,
        ),
        loss_cls=dict(type='mmdet.GaussianFocalLoss', reduction='mean'),
        loss_bbox=dict(type='mmdet.L1Loss', reduction='mean', loss_weight=0.25),
        norm_bbox=True,
    ),
    train_cfg=dict(
        pts=dict(
            point_cloud_range=point_cloud_range,
            grid_size=[288, 288, 1],
            voxel_size=voxel_size,
            out_size_factor=4,
            dense_reg=1,
            gaussian_overlap=0.1,
            max_objs=200,
            min_radius=1,
            code_weights=[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2],
        )
    ),
    test_cfg=dict(
        pts=dict(
            post_center_limit_range=[-40.0, -40.0, -10.0, 40.0, 40.0, 10.0],
            max_per_img=100,
            max_pool_nms=False,
            nms_type='circle',
            min_radius=[4, 12, 10, 1, 0.85, 0.175],
            score_threshold=0.05,
            pc_range=point_cloud_range[:2],
            out_size_factor=4,
            voxel_size=voxel_size[:2],
            post_max_size=83,
        )
    ),
)

train_cfg = dict(val_interval=3)
