# The tiny BEVFusion with nothing but its sparse LiDAR encoder in INT8.
_base_ = ['./bevfusion_tiny_lidar-cam_synthetic.py']

model = dict(pts_middle_encoder=dict(type='QuantBEVFusionSparseEncoder'))
