# QAT of the tiny BEVFusion: the INT8 model, trained on from its calibrated checkpoint.
#   python tools/calibrate.py configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_int8_synthetic.py \\
#       checkpoints/bevfusion_tiny_lidar-cam_synthetic.pth --out work_dirs/int8.pth
#   python tools/train.py configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_qat_synthetic.py
# What chose these numbers: docs/qat.md.
_base_ = ['./bevfusion_tiny_lidar-cam_int8_synthetic.py']
custom_imports = dict(
    imports=['mmdet3d_quant', 'mmdet3d_quant.bevfusion', 'mmdet3d_quant.qat'],
    allow_failed_imports=False,
)

load_from = 'work_dirs/int8.pth'
custom_hooks = [
    dict(type='QATHook', freeze_bn=0),
    # The float model teaches the map that the head reads, and the heatmap that it finds objects in.
    dict(
        type='DistillHook',
        checkpoint=load_from,
        modules={'pts_neck': 1.0, 'bbox_head.heatmap_head': 1.0},
    ),
]
model = dict(bbox_head=dict(sync_avg_factor=True))  # several processes train like one

# A hundredth of the learning rate and a quarter of the time of the float training.
max_epochs = 1
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=2e-5))
param_scheduler = [
    dict(_base_.param_scheduler[0], start_factor=0.1, end=20),
    dict(_base_.param_scheduler[1], T_max=max_epochs, end=max_epochs, eta_min_ratio=1e-2),
]
# Workers of a resumed run start afresh; so must those of every epoch, for the same augmentations.
train_dataloader = dict(persistent_workers=False)
