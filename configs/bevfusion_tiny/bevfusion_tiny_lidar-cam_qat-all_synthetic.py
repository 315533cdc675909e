# QAT of the tiny BEVFusion with both branches in INT8, from its calibrated checkpoint.
#   python tools/calibrate.py \
#       configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_int8-all_synthetic.py \
#       checkpoints/bevfusion_tiny_lidar-cam_synthetic.pth --out work_dirs/int8-all.pth
#   python tools/train.py configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_qat-all_synthetic.py
_base_ = ['./bevfusion_tiny_lidar-cam_qat_synthetic.py']

model = dict(pts_middle_encoder=dict(type='QuantBEVFusionSparseEncoder'))
load_from = 'work_dirs/int8-all.pth'
custom_hooks = [
    dict(type='QATHook', freeze_bn=0),
    # As without the LiDAR encoder, and the float model also teaches that encoder its map.
    dict(
        type='DistillHook',
        checkpoint=load_from,
        modules={'pts_middle_encoder': 1.0, 'pts_neck': 1.0, 'bbox_head.heatmap_head': 1.0},
    ),
]
