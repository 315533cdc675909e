# A PointPillars that trains on a CPU: the published architecture in small, with anchors for the ten
# classes, on the LiDAR data of the tiny BEVFusion.
#   python tools/train.py configs/pointpillars_tiny/pointpillars_tiny_synthetic.py --amp
_base_ = ['../bevfusion_tiny/bevfusion_tiny_lidar_synthetic.py']

# Metres. 72 / 0.25 = 288 pillars along x and y; one cell of the head per 4 pillars (1 m).
point_cloud_range = _base_.point_cloud_range
voxel_size = [0.25, 0.25, 8]
norm = dict(type='BN', eps=1e-3, momentum=0.01)
# Length, width, height in the order of `class_names`. Small classes have a cell at least, so that
# some anchor overlaps every object.
sizes = [
    [4.50, 1.90, 1.65], [7.05, 2.52, 2.93], [6.39, 2.84, 3.12], [10.86, 2.93, 3.40],
    [11.24, 3.00, 3.91], [1.00, 2.39, 1.00], [2.11, 1.00, 1.48], [1.78, 1.00, 1.46],
    [1.00, 1.00, 1.75], [1.00, 1.00, 1.01],
]  # yapf: disable
# Least overlap of an anchor that is trained as an object, and largest of one trained as none.
overlaps = [
    (0.55, 0.4), (0.55, 0.4), (0.55, 0.4), (0.55, 0.4), (0.5, 0.35), (0.35, 0.2), (0.4, 0.25),
    (0.4, 0.25), (0.35, 0.15), (0.15, 0.05),
]  # yapf: disable

model = dict(
    _delete_=True,
    type='VoxelNet',
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
    voxel_encoder=dict(
        type='PillarFeatureNet',
        in_channels=5,
        feat_channels=[32],
        voxel_size=voxel_size,
        point_cloud_range=point_cloud_range,
        norm_cfg=dict(type='BN1d', eps=1e-3, momentum=0.01),
        legacy=False,
    ),
    middle_encoder=dict(type='PointPillarsScatter', in_channels=32, output_shape=[288, 288]),
    backbone=dict(
        type='SECOND',
        in_channels=32,
        out_channels=[32, 64, 128],
        layer_nums=[2, 3, 3],
        layer_strides=[2, 2, 2],
        norm_cfg=norm,
        conv_cfg=dict(type='Conv2d', bias=False),
    ),
    neck=dict(
        type='SECONDFPN',
        in_channels=[32, 64, 128],
        out_channels=[32, 32, 32],
        upsample_strides=[0.5, 1, 2],
        norm_cfg=norm,
        upsample_cfg=dict(type='deconv', bias=False),
        use_conv_for_no_stride=True,
    ),
    bbox_head=dict(
        type='Anchor3DHead',
        num_classes=10,
        in_channels=96,
        feat_channels=96,
        use_direction_classifier=True,
        assign_per_class=True,
        anchor_generator=dict(
            type='AlignedAnchor3DRangeGenerator',
            ranges=[[-36.0, -36.0, -1.87, 36.0, 36.0, -1.87]],
            sizes=sizes,
            rotations=[0, 1.57],
            custom_values=[0, 0],  # velocity
            reshape_out=False,
        ),
        diff_rad_by_sin=True,
        dir_offset=-0.7854,
        bbox_coder=dict(type='DeltaXYZWLHRBBoxCoder', code_size=9),
        loss_cls=dict(
            type='mmdet.FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0
        ),
        loss_bbox=dict(type='mmdet.SmoothL1Loss', beta=1.0 / 9.0, loss_weight=1.0),
        loss_dir=dict(type='mmdet.CrossEntropyLoss', use_sigmoid=False, loss_weight=0.2),
    ),
    train_cfg=dict(
        assigner=[
            dict(
                type='Max3DIoUAssigner',
                iou_calculator=dict(type='mmdet3d.BboxOverlapsNearest3D'),
                pos_iou_thr=least,
                neg_iou_thr=largest,
                min_pos_iou=0.02,
                ignore_iof_thr=-1,
            )
            for least, largest in overlaps
        ],
        allowed_border=0,
        code_weight=[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2],
        pos_weight=-1,
    ),
    test_cfg=dict(
        use_rotate_nms=True,
        nms_across_levels=False,
        nms_thr=0.2,
        score_thr=0.05,
        min_bbox_size=0,
        nms_pre=500,
        max_num=200,
    ),
)

train_cfg = dict(val_interval=3)
