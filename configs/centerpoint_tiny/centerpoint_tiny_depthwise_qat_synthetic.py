# QAT of the tiny CenterPoint with a depthwise RegNet: the INT8 model, trained on from its
# calibrated checkpoint.
#   INT8=configs/centerpoint_tiny/centerpoint_tiny_depthwise_int8_synthetic.py
#   python tools/calibrate.py $INT8 \
#       checkpoints/centerpoint_tiny_depthwise_synthetic.pth --num-batches 8 --empty-cells \
#       --bias-correction '*' --out work_dirs/centerpoint_depthwise_int8.pth
#   QAT=configs/centerpoint_tiny/centerpoint_tiny_depthwise_qat_synthetic.py
#   python tools/train.py $QAT --amp
_base_ = ['./centerpoint_tiny_depthwise_int8_synthetic.py']
custom_imports = dict(
    imports=['mmdet3d_quant', 'mmdet3d_quant.bevfusion', 'mmdet3d_quant.qat'],
    allow_failed_imports=False,
)

load_from = 'work_dirs/centerpoint_depthwise_int8.pth'
teacher = 'checkpoints/centerpoint_tiny_depthwise_synthetic.pth'
custom_hooks = [
    dict(type='QATHook', freeze_bn=0),
    # The float model teaches the map that the head reads.
    dict(type='DistillHook', checkpoint=teacher, modules={'pts_neck': 1.0}),
]

# A sixteenth of the training frames once, at a hundredth of the float learning rate.
max_epochs = 1
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=2e-5))
param_scheduler = [
    dict(_base_.param_scheduler[0], start_factor=0.1, end=20),
    dict(_base_.param_scheduler[1], T_max=max_epochs, end=max_epochs, eta_min_ratio=1e-2),
]
train_dataloader = dict(persistent_workers=False, dataset=dict(indices=160))
