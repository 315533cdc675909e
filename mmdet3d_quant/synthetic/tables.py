"""The 13 tables of nuScenes v1.0, filled block by block."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Sequence

import cv2
import numpy as np

from mmdet3d_quant.data.nuscenes import TABLES
from mmdet3d_quant.synthetic.sensors import CAMERAS, LIDAR, LIDAR_ROTATION, LIDAR_TRANSLATION

VERSION = 'v1.0-mini'
#: The scenes of nuScenes mini; mmdet3d takes any other name for a validation scene.
TRAIN_SCENES = (
    'scene-0061',
    'scene-0553',
    'scene-0655',
    'scene-0757',
    'scene-0796',
    'scene-1077',
    'scene-1094',
    'scene-1100',
)
VAL_SCENES = ('scene-0103', 'scene-0916')
CATEGORIES = (
    'human.pedestrian.adult',
    'human.pedestrian.child',
    'human.pedestrian.wheelchair',
    'human.pedestrian.stroller',
    'human.pedestrian.personal_mobility',
    'human.pedestrian.police_officer',
    'human.pedestrian.construction_worker',
    'animal',
    'vehicle.car',
    'vehicle.motorcycle',
    'vehicle.bicycle',
    'vehicle.bus.bendy',
    'vehicle.bus.rigid',
    'vehicle.truck',
    'vehicle.construction',
    'vehicle.emergency.ambulance',
    'vehicle.emergency.police',
    'vehicle.trailer',
    'movable_object.barrier',
    'movable_object.trafficcone',
    'movable_object.pushable_pullable',
    'movable_object.debris',
    'static_object.bicycle_rack',
)
ATTRIBUTES = (
    'vehicle.moving',
    'vehicle.stopped',
    'vehicle.parked',
    'cycle.with_rider',
    'cycle.without_rider',
    'pedestrian.sitting_lying_down',
    'pedestrian.standing',
    'pedestrian.moving',
)
VISIBILITIES = {'1': 'v0-40', '2': 'v40-60', '3': 'v60-80', '4': 'v80-100'}
CHANNELS = (*(c.name for c in CAMERAS), LIDAR)
_START = 1532402927000000  # microseconds
_SCENE_TIME = 10_000_000_000  # between the starts of scenes, microseconds


def token(*parts: Any) -> str:
    """Computes a token that depends on nothing but its parts."""
    return hashlib.md5('/'.join(map(str, parts)).encode()).hexdigest()


def log_name(scene: str) -> str:
    return f'n015-2018-07-24-11-{scene[-4:-2]}-{scene[-2:]}+0800'


def timestamp(scene: str, seconds: float) -> int:
    """Converts seconds from the first key frame of a scene to nuScenes' time, microseconds."""
    return _START + int(scene[-4:]) * _SCENE_TIME + round(seconds * 1e6)


def file_name(scene: str, channel: str, when: int, key: bool) -> str:
    """Composes the path of a recording below the data root."""
    suffix = '.pcd.bin' if channel == LIDAR else '.jpg'
    folder = 'samples' if key else 'sweeps'
    return f'{folder}/{channel}/{log_name(scene)}__{channel}__{when}{suffix}'


def write_tables(
    root: Path, samples: dict[str, int], width: int, blocks: Sequence[dict[str, list[dict]]]
) -> None:
    """Writes all tables and the map.

    Args:
        root: Data root.
        samples: Scenes and their numbers of key frames.
        width: Width of the images, pixels.
        blocks: Results of ``record_block`` for each block, in order: lists of ``sample``,
            ``sample_data``, ``ego_pose``, ``instance`` and ``sample_annotation`` rows.
    """
    tables: dict[str, list[dict]] = {name: [] for name in TABLES}
    for name in CATEGORIES:
        tables['category'].append(dict(token=token('category', name), name=name, description=''))
    for name in ATTRIBUTES:
        tables['attribute'].append(dict(token=token('attribute', name), name=name, description=''))
    for number, level in VISIBILITIES.items():
        tables['visibility'].append(dict(token=number, level=level, description=''))
    for channel in CHANNELS:
        modality = 'lidar' if channel == LIDAR else 'camera'
        tables['sensor'].append(
            dict(token=token('sensor', channel), channel=channel, modality=modality)
        )
    for name, count in samples.items():
        _add_scene(tables, name, count, width)
    for block in blocks:
        for name, rows in block.items():
            tables[name].extend(rows)
    folder = root / VERSION
    folder.mkdir(parents=True, exist_ok=True)
    (root / 'maps').mkdir(exist_ok=True)
    for row in tables['map']:
        cv2.imwrite(str(root / row['filename']), np.full((8, 8), 255, np.uint8))
    for name, rows in tables.items():
        (folder / f'{name}.json').write_text(json.dumps(rows, indent=0))


def _add_scene(tables: dict[str, list[dict]], name: str, samples: int, width: int) -> None:
    log = token('log', name)
    tables['log'].append(
        dict(
            token=log,
            logfile=log_name(name),
            vehicle='n015',
            date_captured='2018-07-24',
            location='singapore-onenorth',
        )
    )
    tables['map'].append(
        dict(
            token=token('map', name),
            log_tokens=[log],
            category='semantic_prior',
            filename=f'maps/{token("map", name)}.png',
        )
    )
    tables['scene'].append(
        dict(
            token=token('scene', name),
            log_token=log,
            nbr_samples=samples,
            first_sample_token=token('sample', name, 0),
            last_sample_token=token('sample', name, samples - 1),
            name=name,
            description='synthetic',
        )
    )
    rig = [(c.name, c.translation, c.rotation, c.intrinsics(width).tolist()) for c in CAMERAS]
    for channel, where, rotation, matrix in [*rig, (LIDAR, LIDAR_TRANSLATION, LIDAR_ROTATION, [])]:
        tables['calibrated_sensor'].append(
            dict(
                token=token('calibrated_sensor', name, channel),
                sensor_token=token('sensor', channel),
                translation=list(where),
                rotation=rotation.elements.tolist(),
                camera_intrinsic=matrix,
            )
        )
