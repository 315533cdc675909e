# QAT of the near BEVFusion: the INT8 model, trained on from its calibrated checkpoint.
#   INT8=configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_near_int8_synthetic.py
#   python tools/calibrate.py $INT8 \
#       checkpoints/bevfusion_tiny_lidar-cam_near_synthetic.pth --num-batches 8 \
#       --out work_dirs/near_fusion_int8.pth
#   QAT=configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_near_qat_synthetic.py
#   python tools/train.py $QAT --amp
_base_ = ['./bevfusion_tiny_lidar-cam_near_int8_synthetic.py']
custom_imports = dict(
    imports=['mmdet3d_quant', 'mmdet3d_quant.bevfusion', 'mmdet3d_quant.qat'],
    allow_failed_imports=False,
)

load_from = 'work_dirs/near_fusion_int8.pth'
custom_hooks = [
    dict(type='QATHook', freeze_bn=0),
    # The float model teaches the map that the head reads, and the heatmap that it finds objects in.
    dict(
        type='DistillHook',
        checkpoint=load_from,
        modules={'pts_neck': 1.0, 'bbox_head.heatmap_head': 1.0},
    ),
]

# A sixteenth of the training frames once, at a hundredth of the float learning rate.
max_epochs = 1
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=1.5e-5))
param_scheduler = [
    dict(_base_.param_scheduler[0], start_factor=0.1, end=10),
    dict(_base_.param_scheduler[1], T_max=max_epochs, end=max_epochs, eta_min_ratio=1e-2),
]
train_dataloader = dict(persistent_workers=False, dataset=dict(indices=160))
