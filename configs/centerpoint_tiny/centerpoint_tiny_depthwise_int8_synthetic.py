# The tiny CenterPoint with a depthwise RegNet in INT8, types changed as by
# tools/quantize_config.py.
#   INT8=configs/centerpoint_tiny/centerpoint_tiny_depthwise_int8_synthetic.py
#   python tools/calibrate.py $INT8 \
#       checkpoints/centerpoint_tiny_depthwise_synthetic.pth --num-batches 8 --empty-cells \
#       --bias-correction '*' --out work_dirs/centerpoint_depthwise_int8.pth
_base_ = ['./centerpoint_tiny_depthwise_synthetic.py']

model = dict(
    type='Quantized',
    of='CenterPoint',
    skip=dict(
        pts_voxel_encoder=(
            'the offsets of the points in a cell are small beside the coordinates, and would be '
            'lost in steps of INT8'
        ),
    ),
    pts_backbone=dict(type='Quant', of='mmdet.RegNet'),
    pts_neck=dict(type='QuantSECONDFPN'),
    pts_bbox_head=dict(type='Quant', of='CenterHead'),
)
