# The tiny CenterPoint in INT8, types changed as by tools/quantize_config.py.
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
    pts_backbone=dict(
        type='QuantSECOND',
        # Cells without points share one value per channel. Rounded here, where few cells are a
        # hundred times larger, it is off alike in all of them (docs/accuracy.md).
        skip={'blocks.0.3': 'the value of empty cells is lost beside that of the largest'},
    ),
    pts_neck=dict(type='QuantSECONDFPN'),
    pts_bbox_head=dict(type='Quant', of='CenterHead'),
)
