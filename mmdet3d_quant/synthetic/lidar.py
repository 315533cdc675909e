"""LiDAR scans: rays against cuboid parts, then the noise and losses of a real sensor."""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence

import numpy as np

from mmdet3d_quant.synthetic.sensors import (
    AZIMUTHS,
    ELEVATIONS,
    LIDAR_RANGE,
    LIDAR_TRANSLATION,
    Pose,
)
from mmdet3d_quant.synthetic.world import Thing

#: Standard deviation of distances, metres; cut off at 2.5 times that.
RANGE_NOISE = 0.01
GROUND_REFLECTIVITY = 0.045
_BEARINGS = np.linspace(-math.pi, math.pi, AZIMUTHS, endpoint=False)
_STEP = 2 * math.pi / AZIMUTHS


class Scan(NamedTuple):
    """One turn of the LiDAR.

    Attributes:
        points: x, y, z in the LiDAR frame (metres), intensity (0 to 255), ring; float32 (N, 5).
        thing: Index of the object hit, (N,); -1 for ground and clutter.
        hits: Returns from each thing, (T,).
        possible: Returns that each would give if nothing occluded it, (T,).
    """

    points: np.ndarray
    thing: np.ndarray
    hits: np.ndarray
    possible: np.ndarray


class _Rays(NamedTuple):
    """The nearest hit of each ray so far, each (beams, azimuths)."""

    distance: np.ndarray
    thing: np.ndarray
    reflectivity: np.ndarray
    facing: np.ndarray  # cosine between the ray and the surface's normal


def scan(
    things: Sequence[Thing], time: float, ego: Pose, rng: np.random.Generator, rain: float = 0.0
) -> Scan:
    """Casts one turn, as if taken at one instant.

    Args:
        things: Objects, standing and moving.
        time: Seconds from the block's first key frame.
        ego: Pose of the ego car, in the frame of ``things``.
        rng: Source of noise.
        rain: 0 (dry) to 1: more clutter near the sensor and more lost returns.
    """
    sensor = ego @ Pose(LIDAR_TRANSLATION[0], LIDAR_TRANSLATION[1], -math.pi / 2)
    down = np.minimum(np.sin(ELEVATIONS), -1e-6)
    far = np.repeat((-LIDAR_TRANSLATION[2] / down)[:, None], AZIMUTHS, axis=1)
    rays = _Rays(
        distance=np.where(far < LIDAR_RANGE * 1.5, far, np.inf),
        thing=np.full(far.shape, -1),
        reflectivity=np.full(far.shape, GROUND_REFLECTIVITY),
        facing=np.repeat(-np.sin(ELEVATIONS)[:, None], AZIMUTHS, axis=1),
    )
    possible = [_cast(thing, k, thing.at(time), sensor, rays) for k, thing in enumerate(things)]
    lost = rng.random(far.shape) <= _lost(rays.distance, rays.reflectivity, rain)
    keep = (rays.distance > 1.0) & ~lost
    ring, column = np.nonzero(keep)
    thing = rays.thing[keep]
    noise = np.clip(rng.normal(0, RANGE_NOISE, len(ring)), -2.5 * RANGE_NOISE, 2.5 * RANGE_NOISE)
    distance = rays.distance[keep] + noise
    strength = 255 * rays.reflectivity[keep] * np.sqrt(np.clip(rays.facing[keep], 0.02, 1))
    strength *= np.exp(rng.normal(0, 0.25, len(ring)))
    clutter = rng.random(len(ring)) < 0.0008 + 0.02 * rain  # drops and dust return early
    early = np.minimum(distance, 1.2 + rng.exponential(2.5, len(ring)))
    distance = np.where(clutter, early, distance)
    thing = np.where(clutter, -1, thing)
    strength = np.where(clutter, rng.uniform(0, 6, len(ring)), strength)
    flat = distance * np.cos(ELEVATIONS)[ring]
    points = np.stack(
        [
            flat * np.cos(_BEARINGS[column]),
            flat * np.sin(_BEARINGS[column]),
            distance * np.sin(ELEVATIONS)[ring],
            np.clip(strength, 0, 255).round(),
            ring,
        ],
        axis=-1,
    )
    hits = np.bincount(thing[thing >= 0], minlength=len(things))
    return Scan(points.astype(np.float32), thing, hits, np.array(possible, dtype=int))


def _lost(distance: np.ndarray, reflectivity: np.ndarray, rain: float) -> np.ndarray:
    """Computes the probability that a return is too weak, for each ray."""
    share = np.clip(distance / LIDAR_RANGE, 0, 1)
    dark = np.clip(0.03 / np.maximum(reflectivity, 1e-3), 0, 1.5)
    chance = 0.03 + 0.05 * rain + share**2 * (0.15 + 0.25 * dark + 0.3 * rain)
    return np.where(distance < LIDAR_RANGE, chance, 1.0)


def _cast(thing: Thing, index: int, pose: Pose, sensor: Pose, rays: _Rays) -> int:
    """Casts the rays that may hit one object; keeps the nearest hit of each ray.

    Returns:
        int, the number of rays that would hit it if nothing occluded it.
    """
    height = LIDAR_TRANSLATION[2]
    dx, dy = pose.x - sensor.x, pose.y - sensor.y
    low, high, columns = _window(thing, math.hypot(dx, dy), math.atan2(dy, dx) - sensor.yaw)
    if not len(columns) or low >= high:
        return 0
    c, s = math.cos(pose.yaw), math.sin(pose.yaw)
    origin = np.array([-(c * dx + s * dy), s * dx - c * dy, height])
    turn = _BEARINGS[columns] + sensor.yaw - pose.yaw
    flat, up = np.cos(ELEVATIONS[low:high]), np.sin(ELEVATIONS[low:high])
    d = np.empty((high - low, len(columns), 3))  # directions in the thing's frame
    d[..., 0], d[..., 1] = flat[:, None] * np.cos(turn), flat[:, None] * np.sin(turn)
    d[..., 2] = up[:, None]
    d[np.abs(d) < 1e-9] = 1e-9
    inverse = (1 / d)[:, :, None]
    t1, t2 = (thing.solid.low - origin) * inverse, (thing.solid.high - origin) * inverse
    entries = np.minimum(t1, t2)  # (rows, columns, parts, axes)
    enter, leave = entries.max(axis=-1), np.maximum(t1, t2).min(axis=-1)
    enter = np.where((enter < leave) & (enter > 0), enter, np.inf)
    part, nearest = enter.argmin(axis=-1), enter.min(axis=-1)
    won = nearest < rays.distance[low:high, columns]
    rows, cols = np.nonzero(won)
    part = part[won]
    axis = entries[rows, cols, part].argmax(axis=-1)
    grid = rows + low, columns[cols]
    rays.distance[grid], rays.thing[grid] = nearest[won], index
    rays.reflectivity[grid] = thing.solid.reflectivity[part]
    rays.facing[grid] = np.abs(d[rows, cols, axis])
    return int((nearest < LIDAR_RANGE).sum())


def _window(thing: Thing, far: float, bearing: float) -> tuple[int, int, np.ndarray]:
    """Finds first and last row, and the columns, of the rays that may hit an object.

    Args:
        thing: The thing.
        far: Distance of its middle, metres.
        bearing: Its direction in the LiDAR's frame, radians.
    """
    reach = math.hypot(*thing.size[:2]) / 2
    if far - reach > LIDAR_RANGE:
        return 0, 0, np.arange(0)
    if far > reach:
        half, middle = math.asin(reach / far), bearing + math.pi
        first, last = math.ceil((middle - half) / _STEP), math.floor((middle + half) / _STEP)
        columns = np.arange(first, last + 1) % AZIMUTHS
    else:
        columns = np.arange(AZIMUTHS)
    near = max(far - reach, 0.3)
    top = thing.size[2] - LIDAR_TRANSLATION[2]
    low = np.searchsorted(ELEVATIONS, math.atan2(-LIDAR_TRANSLATION[2], near))
    high = np.searchsorted(ELEVATIONS, math.atan2(top, near if top > 0 else far + reach))
    return int(low), int(high), columns
