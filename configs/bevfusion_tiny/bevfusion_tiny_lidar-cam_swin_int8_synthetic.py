# The tiny BEVFusion with a Swin backbone in INT8; the LiDAR encoder stays float.
_base_ = ['./bevfusion_tiny_lidar-cam_swin_synthetic.py']

model = dict(
    img_backbone=dict(type='Quant', of='mmdet.SwinTransformer'),
    img_neck=dict(type='QuantGeneralizedLSSFPN'),
    view_transform=dict(type='QuantDepthLSSTransform'),
    fusion_layer=dict(type='QuantConvFuser'),
    pts_backbone=dict(type='QuantSECOND'),
    pts_neck=dict(type='QuantSECONDFPN'),
)
