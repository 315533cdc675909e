"""One frame for trials, on disk: a nuScenes key frame of the user's, or a generated one.

Both are folders of the same kind (six images, one point cloud, one info file of mmdet3d's
version 2), which a config reads through its own data set and pipeline.
"""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmdet3d_quant.core.naming import type_name

#: Yaw of each camera in degrees, counterclockwise from straight ahead.
CAMERAS = {
    'CAM_FRONT': 0,
    'CAM_FRONT_RIGHT': -56,
    'CAM_FRONT_LEFT': 55,
    'CAM_BACK': 180,
    'CAM_BACK_LEFT': 108,
    'CAM_BACK_RIGHT': -111,
}
IMAGE_SIZE = (900, 1600)
#: Environment variable with the folder of a real nuScenes key frame, where there is one: six
#: images, one point cloud and one ``*.pkl`` info file of mmdet3d's version 2.
FRAME = 'MMDET3D_QUANT_FRAME'
#: Height of the sensor above the ground, and depth of a generated object, in metres.
_SENSOR, _DEPTH = 1.84, 4.0


def real_frame() -> Path | None:
    """Reads the folder from the environment variable :data:`FRAME`; None if it is not set.

    Raises:
        FileNotFoundError: If it is not there or has no info file.
    """
    name = os.environ.get(FRAME)
    if not name:
        return None
    folder = Path(name)
    if not any(folder.glob('*.pkl')):
        raise FileNotFoundError(
            f'{FRAME}={name}: expected a folder with six images, a point cloud and an info file '
            '(*.pkl); correct the variable or unset it'
        )
    return folder


def frame_settings(cfg: Any, folder: str | Path) -> dict[str, Any]:
    """Makes top-level settings with which a config reads the one frame of a folder.

    Args:
        cfg: A config with ``test_dataloader`` (a dict or mmengine's ``Config``); not changed.
        folder: Folder with the images, the point cloud and one ``*.pkl`` info file.

    Returns:
        ``test_dataloader``, ``val_dataloader`` and ``calib_dataloader``, alike, without worker
        processes and without sweeps, which a single frame does not have.

    Raises:
        FileNotFoundError: If the folder has no info file.
    """
    info = next(iter(sorted(Path(folder).glob('*.pkl'))), None)
    if info is None:
        raise FileNotFoundError(f'{folder} has no info file (*.pkl)')
    dataset = dict(cfg['test_dataloader']['dataset'])
    dataset.update(
        data_root=str(Path(folder).resolve()),
        ann_file=info.name,
        data_prefix=dict.fromkeys(('pts', 'sweeps', *CAMERAS), ''),
        pipeline=[
            step
            for step in dataset['pipeline']
            if type_name(step['type']) != 'LoadPointsFromMultiSweeps'
        ],
    )
    loader = dict(
        batch_size=1,
        num_workers=0,
        persistent_workers=False,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dataset,
    )
    return dict.fromkeys(('test_dataloader', 'val_dataloader', 'calib_dataloader'), loader)


def make_frame(folder: str | Path, seed: int = 0) -> Path:
    """Writes a generated frame: textured images and a LiDAR scan of a plain with labelled boxes.

    Args:
        folder: Folder to create; a frame in it is replaced.
        seed: Seed; the same seed gives the same frame.

    Returns:
        ``folder``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    images = {}
    for name, yaw in CAMERAS.items():
        cv2.imwrite(str(folder / f'{name}.jpg'), _texture(rng))
        lidar2cam, cam2img = _camera(yaw)
        images[name] = dict(
            img_path=f'{name}.jpg',
            cam2img=cam2img.tolist(),
            lidar2cam=lidar2cam.tolist(),
            cam2ego=np.linalg.inv(lidar2cam).tolist(),
            sample_data_token=name,
            timestamp=0.0,
        )
    points, instances = _scan(rng)
    points.tofile(folder / 'LIDAR_TOP.bin')
    frame = dict(
        sample_idx=0,
        token='generated',
        timestamp=0.0,
        ego2global=np.eye(4).tolist(),
        images=images,
        lidar_points=dict(
            num_pts_feats=5, lidar_path='LIDAR_TOP.bin', lidar2ego=np.eye(4).tolist()
        ),
        instances=instances,
        cam_instances={},
    )
    meta = dict(dataset='nuscenes', version='generated', info_version='1.1')
    with open(folder / 'frame.pkl', 'wb') as file:
        pickle.dump(dict(metainfo=meta, data_list=[frame]), file)
    return folder


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Draws noise of all sizes between a bright sky and a dark ground, uint8 (H, W, 3)."""
    height, width = IMAGE_SIZE
    image = np.linspace(200, 80, height)[:, None, None] * np.ones((1, width, 3))
    for cells in (4, 16, 64, 256):
        noise = rng.normal(0, 90 / math.sqrt(cells), (cells, 2 * cells, 3))
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return image.clip(0, 255).astype(np.uint8)


def _camera(yaw: float) -> tuple[np.ndarray, np.ndarray]:
    """Makes the LiDAR-to-camera matrix (4, 4), metres, and camera matrix (3, 3), pixels."""
    a = math.radians(yaw)
    ahead = np.array([-math.sin(a), math.cos(a), 0.0])  # nuScenes' LiDAR looks along +y
    right, down = np.cross(ahead, [0.0, 0.0, 1.0]), np.array([0.0, 0.0, -1.0])
    lidar2cam = np.eye(4)
    lidar2cam[:3, :3] = [right, down, ahead]
    lidar2cam[:3, 3] = -lidar2cam[:3, :3] @ np.array([0.0, 0.0, -0.3])
    height, width = IMAGE_SIZE
    cam2img = np.array([[1260.0, 0, width / 2], [0, 1260.0, height / 2], [0, 0, 1]])
    return lidar2cam, cam2img


def _scan(rng: np.random.Generator) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Generates points and the objects that they lie on.

    Returns:
        x, y, z (metres), intensity (0-255) and ring of 32 beams, float32 (P, 5); and an info
        file's ``instances``.
    """
    elevation = np.radians(np.linspace(-30.67, 10.67, 32))[:, None]
    azimuth = np.linspace(-math.pi, math.pi, 1080, endpoint=False)[None]
    with np.errstate(divide='ignore'):
        ground = np.where(elevation < 0, -_SENSOR / np.sin(elevation), 80.0)
    distance = np.broadcast_to(ground, (32, 1080)).copy()
    owner = np.full(distance.shape, -1)
    instances = []
    for number in range(40):  # upright boxes, as sectors in front of the ground
        at, far = rng.uniform(-math.pi, math.pi), rng.uniform(5, 45)
        height = rng.uniform(1.0, 3.0)
        half = rng.uniform(0.5, 2.5)
        hit = np.abs(azimuth - at) < half / far
        hit = hit & (elevation < math.atan2(height - _SENSOR, far)) & (far < distance)
        distance[hit], owner[hit] = far, number
        instances.append(_instance(at, far, 2 * half, height))
    for number, instance in enumerate(instances):
        instance['num_lidar_pts'] = int((owner == number).sum())
    distance = distance + rng.normal(0, 0.02, distance.shape)
    flat = distance * np.cos(elevation)
    ring = np.broadcast_to(np.arange(32)[:, None], distance.shape)
    intensity = rng.gamma(1.0, 15.0, distance.shape).clip(0, 255).round()
    points = np.stack(
        [flat * np.cos(azimuth), flat * np.sin(azimuth), distance * np.sin(elevation)]
        + [intensity, ring],
        axis=-1,
    )
    return points[distance < 70].astype(np.float32), instances


def _instance(at: float, far: float, width: float, height: float) -> dict[str, Any]:
    """Makes an info file's entry of a car or, if wide, a truck, its back to the sensor."""
    centre = far + _DEPTH / 2
    label = int(width > 2.5)
    x, y, z = centre * math.cos(at), centre * math.sin(at), height / 2 - _SENSOR
    return dict(
        bbox_3d=[x, y, z, _DEPTH, width, height, at],
        bbox_3d_isvalid=True,
        bbox_label=label,
        bbox_label_3d=label,
        num_radar_pts=0,
        velocity=[0.0, 0.0],
    )
