# The same detector with nothing but its sparse LiDAR encoder in INT8.
_base_ = ['./bevfusion_lidar-cam_r50_voxel0075_second_secfpn_nus-3d.py']

model = dict(pts_middle_encoder=dict(type='QuantBEVFusionSparseEncoder'))
