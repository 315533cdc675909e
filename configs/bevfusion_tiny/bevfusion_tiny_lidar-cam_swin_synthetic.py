# The tiny BEVFusion with a Swin transformer as its camera backbone. Everything but the backbone and
# the convolutions of the neck that read it starts from the fusion model with the ResNet.
_base_ = ['./bevfusion_tiny_lidar-cam_synthetic.py']

model = dict(
    img_backbone=dict(
        _delete_=True,
        type='mmdet.SwinTransformer',
        embed_dims=24,
        mlp_ratio=3,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 4, 8],
        window_size=4,  # the smallest map has 4 x 11 cells
        out_indices=[1, 2, 3],
        drop_path_rate=0.0,
    ),
    img_neck=dict(in_channels=[48, 96, 192]),
    bbox_head=dict(
        decoder_layer=dict(self_attn_cfg=dict(dropout=0.0), cross_attn_cfg=dict(dropout=0.0))
    ),
)

custom_imports = dict(
    imports=['mmdet3d_quant', 'mmdet3d_quant.bevfusion', 'mmdet3d_quant.qat'],
    allow_failed_imports=False,
)

load_from = 'checkpoints/bevfusion_tiny_lidar-cam_synthetic.pth'
max_epochs = 2
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
# The LiDAR encoder stays, which saves its time, too; what else is trained already moves at a tenth
# of the rate.
custom_hooks = [dict(type='FreezeHook', modules=['pts_middle_encoder'])]
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    paramwise_cfg=dict(
        custom_keys={
            **dict.fromkeys(
                ('pts_', 'fusion_layer', 'bbox_head', 'view_transform'), dict(lr_mult=0.1)
            ),
            'norm': dict(decay_mult=0.0),
            'relative_position_bias_table': dict(decay_mult=0.0),
        }
    ),
)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], T_max=max_epochs, end=max_epochs),
]
