# The tiny BEVFusion in INT8: types change, everything else is inherited.
_base_ = ['./bevfusion_tiny_lidar-cam_synthetic.py']

model = dict(
    img_backbone=dict(type='QuantResNet'),
    img_neck=dict(type='QuantGeneralizedLSSFPN'),
    # In INT8 its downsample costs the tiny model 0.17 points (docs/accuracy.md); 5 % of the work.
    view_transform=dict(type='QuantDepthLSSTransform'),
    fusion_layer=dict(type='QuantConvFuser'),
    pts_backbone=dict(type='QuantSECOND'),
    pts_neck=dict(type='QuantSECONDFPN'),
    bbox_head=dict(type='QuantTransFusionHead'),  # its decoder stays float
)
