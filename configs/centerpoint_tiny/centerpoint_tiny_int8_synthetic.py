# The tiny CenterPoint in INT8, as tools/quantize_config.py writes it: types change.
_base_ = ['./centerpoint_tiny_synthetic.py']

model = dict(
    type='Quantized',
    of='CenterPoint',
    skip=dict(
        pts_voxel_encoder=(
            'the offsets of the points in a cell are small beside the coordinates, and would be '
            'lost in steps of INT8'
        ),
    ),
    pts_backbone=dict(type='QuantSECOND'),
    pts_neck=dict(type='QuantSECONDFPN'),
    pts_bbox_head=dict(type='Quant', of='CenterHead'),
)
