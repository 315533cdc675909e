"""A real nuScenes key frame, where the environment names one, and a generated one elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdet3d_quant.data.samples import FRAME, frame_settings, real_frame

ROOT = Path(__file__).resolve().parents[1]
FLOAT_CONFIG = ROOT / 'configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn_nus-3d.py'


def on_real_frame(test):
    """Marks a test of the real frame: ``make test-frame`` runs it, others pass it over."""
    absent = pytest.mark.skipif(real_frame() is None, reason=f'{FRAME} names no nuScenes frame')
    return pytest.mark.frame(absent(test))


def frame_dataset_cfg(cfg: dict) -> dict:
    """Settings with which the data set of a config reads the real frame."""
    return frame_settings(cfg, real_frame())['test_dataloader']['dataset']
