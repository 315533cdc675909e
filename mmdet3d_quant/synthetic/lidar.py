"""The LiDAR: rays against cuboid parts, then what a real sensor does to the returns."""

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

RANGE_NOISE = 0.01
_BEARINGS = np.linspace(-math.pi, math.pi, AZIMUTHS, endpoint=False)
_STEP = 2 * math.pi / AZIMUTHS


class Scan(NamedTuple):
    """One turn of the LiDAR.

    Attributes:
        points: x, y, z in the LiDAR frame (metres), intensity (0 to 255), ring; float32 (N, 5).
        thing: Index of what was hit, (N,); -1 for ground and clutter.
        hits: Returns from each thing, (T,).
        possible: Returns that each would give if nothing stood before it, (T,).
    """

    points: np.ndarray
    thing: np.ndarray
    hits: np.ndarray
    possible: np.ndarray


def scan(
    things: Sequence[Thing], time: float, ego: Pose, rng: np.random.Generator, rain: float = 0.0
) -> Scan:
    """Casts one turn, as if taken at one instant.

    Args:
        things: What stands and moves around.
        time: Seconds from the block's first key frame.
        ego: Pose of the ego car, in the frame of ``things``.
        rng: Source of noise.
        rain: 0 (dry) to 1: more clutter near the sensor and more lost returns.
    """
    sensor = ego @ Pose(LIDAR_TRANSLATION[0], LIDAR_TRANSLATION[1], -math.pi / 2)
    height = LIDAR_TRANSLATION[2]
    down = np.minimum(np.sin(ELEVATIONS), -1e-6)
    far = np.repeat((-height / down)[:, None], AZIMUTHS, axis=1)
    best = np.where(far < LIDAR_RANGE * 1.5, far, np.inf)
    hit = np.full(best.shape, -1)
    reflectivity = np.full(best.shape, 0.045)
    facing = np.repeat(-np.sin(ELEVATIONS)[:, None], AZIMUTHS, axis=1)
    possible = np.zeros(len(things), dtype=int)
    for k, thing in enumerate(things):
        possible[k] = _cast(thing, k, time, sensor, height, best, hit, reflectivity, facing)
    keep = (best > 1.0) & (rng.random(best.shape) > _lost(best, reflectivity, rain))
    ring, column = np.nonzero(keep)
    thing = hit[keep]
    noise = np.clip(rng.normal(0, RANGE_NOISE, len(ring)), -2.5 * RANGE_NOISE, 2.5 * RANGE_NOISE)
    distance = best[keep] + noise
    strength = 255 * reflectivity[keep] * np.sqrt(np.clip(facing[keep], 0.02, 1))
    strength *= np.exp(rng.normal(0, 0.25, len(ring)))
    hits = np.bincount(thing[thing >= 0], minlength=len(things))
    clutter = rng.random(len(ring)) < 0.0008 + 0.02 * rain  # drops and dust return early
    distance = np.where(
        clutter, np.minimum(distance, 1.2 + rng.exponential(2.5, len(ring))), distance
    )
    struck = clutter & (thing >= 0)
    np.subtract.at(hits, thing[struck], 1)
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
    return Scan(points.astype(np.float32), thing, hits, possible)


def _lost(distance: np.ndarray, reflectivity: np.ndarray, rain: float) -> np.ndarray:
    """Chance that a return is too weak, for each ray."""
    share = np.clip(distance / LIDAR_RANGE, 0, 1)
    dark = np.clip(0.03 / np.maximum(reflectivity, 1e-3), 0, 1.5)
    chance = 0.03 + 0.05 * rain + share**2 * (0.15 + 0.25 * dark + 0.3 * rain)
    return np.where(distance < LIDAR_RANGE, chance, 1.0)


def _cast(thing, index, time, sensor, height, best, hit, reflectivity, facing) -> int:
    """Casts the rays that may hit one thing; updates the nearest hits; counts its hits."""
    pose = thing.at(time)
    dx, dy = pose.x - sensor.x, pose.y - sensor.y
    far, reach = math.hypot(dx, dy), math.hypot(*thing.size[:2]) / 2
    if far - reach > LIDAR_RANGE:
        return 0
    if far > reach:
        half = math.asin(reach / far)
        middle = math.atan2(dy, dx) - sensor.yaw + math.pi
        first = math.ceil((middle - half) / _STEP)
        columns = np.arange(first, math.floor((middle + half) / _STEP) + 1) % AZIMUTHS
    else:
        columns = np.arange(AZIMUTHS)
    near = max(far - reach, 0.3)
    top = thing.size[2] - height
    low = np.searchsorted(ELEVATIONS, math.atan2(-height, near))
    high = np.searchsorted(ELEVATIONS, math.atan2(top, near if top > 0 else far + reach))
    if not len(columns) or low >= high:
        return 0
    solid = thing.solid
    turn = _BEARINGS[columns] + sensor.yaw - pose.yaw
    cos_e, sin_e = np.cos(ELEVATIONS[low:high]), np.sin(ELEVATIONS[low:high])
    d = np.empty((high - low, len(columns), 3))
    d[..., 0], d[..., 1] = cos_e[:, None] * np.cos(turn), cos_e[:, None] * np.sin(turn)
    d[..., 2] = sin_e[:, None]
    d[np.abs(d) < 1e-9] = 1e-9
    c, s = math.cos(pose.yaw), math.sin(pose.yaw)
    origin = np.array([-(c * dx + s * dy), s * dx - c * dy, height])
    inverse = (1 / d)[:, :, None]
    t1, t2 = (solid.low - origin) * inverse, (solid.high - origin) * inverse
    entries = np.minimum(t1, t2)
    enter, leave = entries.max(axis=-1), np.maximum(t1, t2).min(axis=-1)
    enter = np.where((enter < leave) & (enter > 0), enter, np.inf)
    part = enter.argmin(axis=-1)
    rows, cols = np.nonzero(np.isfinite(enter.min(axis=-1)))
    part = part[rows, cols]
    distance = enter[rows, cols, part]
    count = int((distance < LIDAR_RANGE).sum())
    grid = rows + low, columns[cols]
    nearer = distance < best[grid]
    rows, cols, part, distance = rows[nearer], cols[nearer], part[nearer], distance[nearer]
    grid = rows + low, columns[cols]
    axis = entries[rows, cols, part].argmax(axis=-1)
    best[grid], hit[grid] = distance, index
    reflectivity[grid] = solid.reflectivity[part]
    facing[grid] = np.abs(d[rows, cols, axis])
    return count
