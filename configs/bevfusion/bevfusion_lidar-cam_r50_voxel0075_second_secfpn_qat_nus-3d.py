# QAT of the detector, from a calibrated checkpoint. docs/qat.md has the reasons for the numbers.
#   python tools/calibrate.py INT8_CONFIG FLOAT_CHECKPOINT --out work_dirs/int8.pth
#   torchrun --nproc-per-node 8 tools/train.py THIS_CONFIG --amp --launcher pytorch
_base_ = ['./bevfusion_lidar-cam_r50_voxel0075_second_secfpn_int8_nus-3d.py']
custom_imports = dict(
    imports=['mmdet3d_quant', 'mmdet3d_quant.bevfusion', 'mmdet3d_quant.qat'],
    allow_failed_imports=False,
)

load_from = 'work_dirs/int8.pth'
custom_hooks = [
    dict(type='QATHook', freeze_bn=0),
    dict(
        type='DistillHook',
        checkpoint=load_from,
        modules={'pts_neck': 1.0, 'bbox_head.heatmap_head': 1.0},
    ),
]
model = dict(bbox_head=dict(sync_avg_factor=True))  # several processes train like one

# A hundredth of the learning rate of the float training, falling to 0, for one epoch of its six.
train_cfg = dict(max_epochs=1, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=2e-6))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        begin=0,
        T_max=1,
        end=1,
        by_epoch=True,
        eta_min_ratio=1e-2,
        convert_to_iter_based=True,
    ),
]
train_dataloader = dict(persistent_workers=False)  # a resumed run draws the same augmentations
