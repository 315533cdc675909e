"""A real nuScenes key frame, read in place from the folder shared beside the checkout."""

from __future__ import annotations

from pathlib import Path

from mmdet3d_quant.samples import frame_settings

ROOT = Path(__file__).resolve().parents[1]
FLOAT_CONFIG = ROOT / 'configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn_nus-3d.py'


def frame_dir() -> Path | None:
    """Folder with six images, one point cloud and a v2 info file, or None if it is not there."""
    path = ROOT.parent / 'shared' / 'data' / 'nuscenes_frame'
    return path if path.is_dir() else None


def frame_dataset_cfg(cfg: dict) -> dict:
    """Settings with which the data set of a config reads the frame."""
    return frame_settings(cfg, frame_dir())['test_dataloader']['dataset']
