"""A real nuScenes key frame, read in place from the folder shared beside the checkout."""

from __future__ import annotations

from pathlib import Path

_CAMERAS = ('FRONT', 'FRONT_LEFT', 'FRONT_RIGHT', 'BACK', 'BACK_RIGHT', 'BACK_LEFT')
_CONFIG = 'configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn_nus-3d.py'


def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parents[1]


def config_file() -> Path:
    """The float ResNet-50 config."""
    return root() / _CONFIG


def frame_dir() -> Path | None:
    """Folder with six images, one point cloud and a v2 info file, or None if it is not there."""
    path = root().parent / 'shared' / 'data' / 'nuscenes_frame'
    return path if path.is_dir() else None


def frame_dataset_cfg(dataset: dict) -> dict:
    """Dataset settings that read the frame.

    Args:
        dataset: Settings of a ``NuScenesDataset``, as in the configs; left unchanged.

    Returns:
        The settings with the frame's paths and without sweeps, which the frame does not have.

    Raises:
        FileNotFoundError: If the frame is not there.
    """
    folder = frame_dir()
    if folder is None:
        raise FileNotFoundError('no nuScenes frame beside the checkout: ../shared is absent')
    prefixes = ('pts', 'sweeps', *(f'CAM_{name}' for name in _CAMERAS))
    steps = [s for s in dataset['pipeline'] if s['type'] != 'LoadPointsFromMultiSweeps']
    return dict(
        dataset,
        data_root=str(folder),
        ann_file=next(folder.glob('*.pkl')).name,
        data_prefix=dict.fromkeys(prefixes, ''),
        pipeline=steps,
    )


def frame_config_overrides(cfg: dict) -> dict:
    """Top-level settings with which a config tests and calibrates on the frame.

    Args:
        cfg: A config with ``test_dataloader``; left unchanged.

    Returns:
        What to give to ``Config.merge_from_dict`` after removing nothing: three data loaders
        without worker processes, and no evaluators (one frame has no mAP).
    """
    loader = dict(
        batch_size=1,
        num_workers=0,
        persistent_workers=False,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=frame_dataset_cfg(cfg['test_dataloader']['dataset']),
    )
    return dict.fromkeys(('test_dataloader', 'val_dataloader', 'calib_dataloader'), loader)
