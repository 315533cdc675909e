# The tiny PointPillars in INT8, types changed as by tools/quantize_config.py.
# Most cells hold no points: their values are off alike in INT8, unless the model is calibrated with
# --empty-cells (docs/calibration.md).
#   python tools/calibrate.py configs/pointpillars_tiny/pointpillars_tiny_int8_synthetic.py \
#       checkpoints/pointpillars_tiny_synthetic.pth --num-batches 8 --empty-cells \
#       --bias-correction '*' --out work_dirs/pointpillars_int8.pth
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
