"""Recording of one block: its files, and its rows of the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.synthetic.camera import Scene
from mmdet3d_quant.synthetic.kinds import KINDS
from mmdet3d_quant.synthetic.layout import make_block
from mmdet3d_quant.synthetic.lens import expose
from mmdet3d_quant.synthetic.lidar import Scan, scan
from mmdet3d_quant.synthetic.light import HOURS, make_light
from mmdet3d_quant.synthetic.sensors import CAMERAS, LIDAR, Pose
from mmdet3d_quant.synthetic.tables import file_name, timestamp, token
from mmdet3d_quant.synthetic.world import KEYFRAME_INTERVAL, Block, Thing


class Settings(NamedTuple):
    """Settings that decide the content of every block.

    Attributes:
        seed: Seed of everything.
        block: Key frames for which a layout lasts.
        width: Width of the images, pixels.
        sweeps: LiDAR sweeps before each key frame.
        sweep_interval: Seconds between sweeps.
        radius: Labelled objects are within this distance, metres.
        hours: Times of day, of ``HOURS``.
    """

    seed: int = 0
    block: int = 2
    width: int = 704
    sweeps: int = 3
    sweep_interval: float = 0.1
    radius: float = 34.0
    hours: tuple[str, ...] = tuple(HOURS)


def generators(settings: Settings, scene: str, index: int) -> list[np.random.Generator]:
    """Creates the random generators of a block: for layout, light, LiDAR and cameras.

    They depend on seed, scene and block only, so that any part of a set can be made alone.
    """
    root = np.random.SeedSequence([settings.seed, int(scene[-4:]), index])
    return [np.random.default_rng(s) for s in root.spawn(4)]


def make_layout(settings: Settings, scene: str, index: int) -> Block:
    """Draws the layout of a block."""
    return make_block(generators(settings, scene, index)[0], settings.block, settings.radius)


def record_block(
    root: Path, settings: Settings, scene: str, index: int, samples: int
) -> dict[str, list[dict[str, Any]]]:
    """Writes the images and point clouds of a block.

    Args:
        root: Data root; the folders for recordings exist.
        settings: Settings of the data set.
        scene: Name of the scene.
        index: Index of the block in the scene.
        samples: Key frames of the whole scene.

    Returns:
        The block's rows of ``sample``, ``sample_data``, ``ego_pose``, ``instance`` and
        ``sample_annotation``.
    """
    _, light_rng, lidar_rng, camera_rng = generators(settings, scene, index)
    block = make_layout(settings, scene, index)
    light = make_light(light_rng, settings.hours)
    view = Scene(block, light, camera_rng)
    rows = _Rows(scene, block, settings)
    first = index * settings.block
    for key in range(first, first + settings.block):
        time = (key - first) * KEYFRAME_INTERVAL
        rows.add_sample(key, samples)
        for k in range(settings.sweeps, -1, -1):
            moment = time - k * settings.sweep_interval
            result = scan(block.things, moment, block.ego(moment), lidar_rng, light.rain)
            name = rows.add_data(LIDAR, key, first, moment, k == 0)
            result.points.tofile(root / name)
        rows.add_annotations(key, index, time, result)
        pictures = view.frame(time, settings.width)
        for camera, picture in strict_zip(CAMERAS, pictures):
            picture = expose(picture, camera, block.ego(time), light, camera_rng)
            name = rows.add_data(camera.name, key, first, time, True)
            if not cv2.imwrite(str(root / name), picture, [cv2.IMWRITE_JPEG_QUALITY, 90]):
                raise OSError(f'cannot write {root / name}')
    return rows.finish()


class _Rows:
    """Table rows of one block."""

    def __init__(self, scene: str, block: Block, settings: Settings) -> None:
        self.scene, self.block, self.settings = scene, block, settings
        self.sample: list[dict] = []
        self.data: dict[str, list[dict]] = {}
        self.ego_pose: list[dict] = []
        self.annotations: dict[int, list[dict]] = {}

    def add_sample(self, key: int, samples: int) -> None:
        self.sample.append(
            dict(
                token=token('sample', self.scene, key),
                timestamp=timestamp(self.scene, key * KEYFRAME_INTERVAL),
                prev=token('sample', self.scene, key - 1) if key else '',
                next=token('sample', self.scene, key + 1) if key + 1 < samples else '',
                scene_token=token('scene', self.scene),
            )
        )

    def add_data(self, channel: str, key: int, first: int, time: float, is_key: bool) -> str:
        """Adds a recording and the ego pose at its moment; returns its path."""
        when = timestamp(self.scene, first * KEYFRAME_INTERVAL + time)
        name = file_name(self.scene, channel, when, is_key)
        this = token('sample_data', name)
        lidar = channel == LIDAR
        self.data.setdefault(channel, []).append(
            dict(
                token=this,
                sample_token=token('sample', self.scene, key),
                ego_pose_token=this,
                calibrated_sensor_token=token('calibrated_sensor', self.scene, channel),
                timestamp=when,
                fileformat='pcd' if lidar else 'jpg',
                is_key_frame=is_key,
                height=0 if lidar else self.settings.width * 9 // 16,
                width=0 if lidar else self.settings.width,
                filename=name,
            )
        )
        pose = self.block.anchor @ self.block.ego(time)
        self.ego_pose.append(dict(token=this, timestamp=when, **_placed(pose, 0.0)))
        return name

    def add_annotations(self, key: int, index: int, time: float, result: Scan) -> None:
        for k, thing in enumerate(self.block.things):
            if not thing.labelled:
                continue
            instance = token('instance', self.scene, index, k)
            row = dict(
                token=token('annotation', instance, key),
                sample_token=token('sample', self.scene, key),
                instance_token=instance,
                visibility_token=_visibility(result.hits[k], result.possible[k]),
                attribute_tokens=[token('attribute', thing.attribute)] if thing.attribute else [],
                size=list(thing.size),
                num_lidar_pts=int(result.hits[k]),
                num_radar_pts=0,
                **_placed(self.block.anchor @ thing.at(time), thing.centre_height),
            )
            self.annotations.setdefault(k, []).append(row)

    def finish(self) -> dict[str, list[dict]]:
        """Links the chains; returns the rows by table."""
        chains = [*self.data.values(), *self.annotations.values()]
        for chain in chains:
            _link(chain)
        things = self.block.things
        return dict(
            sample=self.sample,
            sample_data=[row for chain in self.data.values() for row in chain],
            ego_pose=self.ego_pose,
            instance=[_instance(rows, things[k]) for k, rows in self.annotations.items()],
            sample_annotation=[row for rows in self.annotations.values() for row in rows],
        )


def _link(chain: list[dict]) -> None:
    for k, row in enumerate(chain):
        row['prev'] = chain[k - 1]['token'] if k else ''
        row['next'] = chain[k + 1]['token'] if k + 1 < len(chain) else ''


def _instance(rows: list[dict], thing: Thing) -> dict[str, Any]:
    return dict(
        token=rows[0]['instance_token'],
        category_token=token('category', KINDS[thing.kind].category),
        nbr_annotations=len(rows),
        first_annotation_token=rows[0]['token'],
        last_annotation_token=rows[-1]['token'],
    )


def _placed(pose: Pose, height: float) -> dict[str, list[float]]:
    return dict(translation=[pose.x, pose.y, height], rotation=pose.rotation.elements.tolist())


def _visibility(hits: int, possible: int) -> str:
    """Looks up nuScenes' visibility level, by the share of rays that reach an object."""
    share = hits / max(0.85 * possible, 1)
    return str(1 + (share > 0.4) + (share > 0.6) + (share > 0.8))
