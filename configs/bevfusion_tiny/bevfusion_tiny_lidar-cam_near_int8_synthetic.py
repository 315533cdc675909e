# The near BEVFusion in INT8: types change, everything else is inherited.
_base_ = ['./bevfusion_tiny_lidar-cam_near_synthetic.py']

model = dict(
    img_backbone=dict(type='QuantResNet'),
    img_neck=dict(type='QuantGeneralizedLSSFPN'),
    view_transform=dict(type='QuantLSSTransform'),  # what the float one is once it is trained
    fusion_layer=dict(type='QuantConvFuser'),
    pts_backbone=dict(type='QuantSECOND'),
    pts_neck=dict(type='QuantSECONDFPN'),
    bbox_head=dict(type='QuantTransFusionHead'),  # its decoder stays float
)
