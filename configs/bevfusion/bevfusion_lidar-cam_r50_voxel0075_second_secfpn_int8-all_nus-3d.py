# The same detector with both branches in INT8: the sparse LiDAR encoder too, but for its first
# convolution, which its type keeps float.
#   python tools/calibrate.py THIS_CONFIG FLOAT_CHECKPOINT --out int8-all.pth --num-batches 128
_base_ = ['./bevfusion_lidar-cam_r50_voxel0075_second_secfpn_int8_nus-3d.py']

model = dict(pts_middle_encoder=dict(type='QuantBEVFusionSparseEncoder'))
