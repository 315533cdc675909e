# The tiny BEVFusion with both branches in INT8: the sparse LiDAR encoder too.
_base_ = ['./bevfusion_tiny_lidar-cam_int8_synthetic.py']

model = dict(pts_middle_encoder=dict(type='QuantBEVFusionSparseEncoder'))
