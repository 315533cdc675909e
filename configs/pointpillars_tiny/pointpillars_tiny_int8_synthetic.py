# The tiny PointPillars in INT8, as tools/quantize_config.py writes it: types change.
_base_ = ['./pointpillars_tiny_synthetic.py']

model = dict(
    type='Quantized',
    of='VoxelNet',
    skip=dict(
        voxel_encoder=(
            'the offsets of the points in a cell are small beside the coordinates, and would be '
            'lost in steps of INT8'
        ),
    ),
    backbone=dict(type='QuantSECOND'),
    neck=dict(type='QuantSECONDFPN'),
    bbox_head=dict(type='Quant', of='Anchor3DHead'),
)
