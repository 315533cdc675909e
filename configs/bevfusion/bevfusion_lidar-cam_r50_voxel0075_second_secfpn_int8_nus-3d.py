# The same detector in INT8: types change, everything else is inherited.
#   python tools/calibrate.py THIS_CONFIG FLOAT_CHECKPOINT --out int8.pth --num-batches 128
#   python tools/export_onnx.py THIS_CONFIG int8.pth --out-dir onnx
_base_ = ['./bevfusion_lidar-cam_r50_voxel0075_second_secfpn_nus-3d.py']

model = dict(
    img_backbone=dict(type='QuantResNet'),  # skip=['conv1'] would keep its first layer float
    img_neck=dict(type='QuantGeneralizedLSSFPN'),
    # In INT8 its downsample costs the tiny model 0.17 points (docs/accuracy.md); 5 % of the work.
    view_transform=dict(type='QuantDepthLSSTransform'),
    fusion_layer=dict(type='QuantConvFuser'),
    pts_backbone=dict(type='QuantSECOND'),
    pts_neck=dict(type='QuantSECONDFPN'),
    bbox_head=dict(type='QuantTransFusionHead'),  # its decoder stays float
)
