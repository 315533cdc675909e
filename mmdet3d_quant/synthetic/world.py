"""Layouts: what stands and moves where around the car, for a few key frames at a time.

Everything is in the block's frame: the road runs along x, and the ego car passes the origin
around the middle of the block. ``Block.anchor`` places that frame in the global one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mmdet3d_quant.synthetic.sensors import Pose
from mmdet3d_quant.synthetic.solid import MARGIN, Solid, make_solid

#: Seconds between key frames.
KEYFRAME_INTERVAL = 0.5
#: Above this speed (m/s) nuScenes' attributes say that an object moves.
MOVING = 0.2
#: A block begins this many seconds before its first key frame, for that frame's sweeps.
LEAD = 0.5


class Kind(NamedTuple):
    """What a class of objects is like.

    Attributes:
        category: Category name of nuScenes; empty for what is not labelled.
        size: Mean width, length, height, metres.
        spread: Standard deviation of the logarithm of the size.
        count: Mean number in a layout.
        moving: Share that moves.
        speed: Slowest and fastest, m/s.
        group: Most members of a row or crowd; 1 for singles.
    """

    category: str
    size: tuple[float, float, float]
    spread: float
    count: float
    moving: float = 0.0
    speed: tuple[float, float] = (0.0, 0.0)
    group: int = 1


KINDS = {
    'bus': Kind('vehicle.bus.rigid', (2.9, 10.8, 3.4), 0.08, 1.1, 0.5, (2, 8)),
    'trailer': Kind('vehicle.trailer', (2.9, 11.0, 3.8), 0.1, 1.1, 0.25, (1, 6)),
    'truck': Kind('vehicle.truck', (2.5, 7.0, 2.9), 0.12, 1.8, 0.4, (2, 9)),
    'construction_vehicle': Kind('vehicle.construction', (2.8, 6.4, 3.1), 0.12, 1.2, 0.2, (0.5, 2)),
    'car': Kind('vehicle.car', (1.9, 4.5, 1.65), 0.07, 6.5, 0.4, (2, 11), 5),
    'barrier': Kind('movable_object.barrier', (2.4, 0.6, 1.0), 0.1, 4.5, group=4),
    'motorcycle': Kind('vehicle.motorcycle', (0.8, 2.1, 1.15), 0.08, 2.2, 0.5, (2, 9)),
    'bicycle': Kind('vehicle.bicycle', (0.62, 1.75, 1.1), 0.08, 2.4, 0.5, (1.5, 5)),
    'pedestrian': Kind('human.pedestrian.adult', (0.68, 0.72, 1.75), 0.08, 6.5, 0.6, (0.5, 1.8), 6),
    'traffic_cone': Kind('movable_object.trafficcone', (0.42, 0.42, 1.0), 0.14, 4.5, group=4),
}
SCENERY = {
    'building': Kind('', (9.0, 12.0, 6.0), 0.3, 2.5),
    'wall': Kind('', (0.4, 7.0, 2.0), 0.3, 1.2),
    'tree': Kind('', (2.6, 2.6, 5.0), 0.25, 3.0),
    'bush': Kind('', (1.3, 1.8, 1.1), 0.25, 2.5),
    'debris': Kind('', (0.8, 0.9, 0.7), 0.3, 2.5),
    'pole': Kind('', (0.8, 0.8, 5.0), 0.2, 5.0),
}
CLASSES = tuple(KINDS)
#: Height with a rider, as a multiple of the height without one.
RIDER_HEIGHT = 1.5
_EGO_BOX = (2.2, 5.0)  # width and length kept free, metres


@dataclass
class Thing:
    """One object: a solid that keeps its heading and speed.

    Attributes:
        kind: Name in ``KINDS`` (labelled) or ``SCENERY``.
        size: Width, length, height of the box, metres.
        pose: Where the middle of its footprint is at time 0, in the block's frame.
        speed: Along its heading, m/s.
        solid: Its parts and faces.
        attribute: Attribute name of nuScenes, or empty.
    """

    kind: str
    size: tuple[float, float, float]
    pose: Pose
    speed: float
    solid: Solid
    attribute: str

    @property
    def labelled(self) -> bool:
        return self.kind in KINDS

    def at(self, time: float) -> Pose:
        """Its pose at a time, seconds from the block's first key frame."""
        way = self.speed * time
        p = self.pose
        return Pose(p.x + way * math.cos(p.yaw), p.y + way * math.sin(p.yaw), p.yaw)

    @property
    def centre_height(self) -> float:
        """Height of the box's centre above the ground; its bottom lies just below."""
        return self.size[2] / 2 - MARGIN


@dataclass
class Block:
    """A layout and how the ego car drives through it.

    Attributes:
        anchor: The block's frame in the global one.
        speed: Of the ego car, m/s.
        turn: Its yaw rate, rad/s.
        middle: Time at which it passes the origin, seconds.
        things: Everything that stands or moves around.
    """

    anchor: Pose
    speed: float
    turn: float
    middle: float
    things: list[Thing]

    def ego(self, time: float) -> Pose:
        """Pose of the ego car in the block's frame."""
        t = time - self.middle
        half, way = self.turn * t / 2, self.speed * t
        return Pose(way * math.cos(half), way * math.sin(half), self.turn * t)


class _Ground:
    """Which ground is taken: rectangles swept by everything placed so far."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, float, float, float]] = []
        self._table = np.zeros((0, 5))

    def free(self, x: float, y: float, yaw: float, half: tuple[float, float], gap: float) -> bool:
        """Whether a rectangle (half length, half width) clears all others by a gap."""
        if len(self._table) != len(self.rows):
            self._table = np.array(self.rows)
        t = self._table
        dx, dy = t[:, 0] - x, t[:, 1] - y
        c, s = np.cos(t[:, 2] - yaw), np.sin(t[:, 2] - yaw)
        abs_c, abs_s = np.abs(c), np.abs(s)
        cy, sy = math.cos(yaw), math.sin(yaw)
        along, across = cy * dx + sy * dy, -sy * dx + cy * dy
        a, b = half[0] + gap, half[1] + gap
        apart = np.abs(along) > a + t[:, 3] * abs_c + t[:, 4] * abs_s
        apart |= np.abs(across) > b + t[:, 3] * abs_s + t[:, 4] * abs_c
        ct, st = np.cos(t[:, 2]), np.sin(t[:, 2])
        apart |= np.abs(ct * dx + st * dy) > t[:, 3] + a * abs_c + b * abs_s
        apart |= np.abs(-st * dx + ct * dy) > t[:, 4] + a * abs_s + b * abs_c
        return bool(apart.all())

    def take(self, x: float, y: float, yaw: float, half: tuple[float, float]) -> None:
        self.rows.append((x, y, yaw, *half))

    def hidden(self, x: float, y: float) -> bool:
        """Whether something larger than a car stands between the origin and a point."""
        far = math.hypot(x, y)
        for ox, oy, yaw, length, width in self.rows[1:]:
            near = math.hypot(ox, oy)
            if near >= far or length < 1.5:
                continue
            bearing = math.atan2(oy, ox)
            across = abs(length * math.sin(yaw - bearing)) + abs(width * math.cos(yaw - bearing))
            off = math.remainder(math.atan2(y, x) - bearing, 2 * math.pi)
            if abs(off) < math.atan2(across, near):
                return True
        return False


def make_block(rng: np.random.Generator, frames: int, radius: float) -> Block:
    """Draws a layout.

    Args:
        rng: Source of everything random.
        frames: Key frames that it lasts.
        radius: Labelled objects are within this distance of the origin, metres.
    """
    last = (frames - 1) * KEYFRAME_INTERVAL
    anchor = Pose(*rng.uniform(300, 1500, 2), rng.uniform(-math.pi, math.pi))
    fast = rng.choice([0.0, rng.uniform(1, 9)])
    block = Block(anchor, fast, rng.uniform(-0.12, 0.12) * (fast > 0), last / 2, [])
    ground = _Ground()
    span = last + LEAD
    ground.take(
        -block.speed * LEAD / 2, 0, 0, (_EGO_BOX[1] / 2 + fast * span / 2, _EGO_BOX[0] / 2 + 0.3)
    )
    for name, kind in {**KINDS, **SCENERY}.items():
        wanted = _count(rng, kind)
        while wanted > 0:
            group = int(rng.integers(2, kind.group + 1)) if kind.group > 1 else 1
            group = min(wanted, group if rng.random() < 0.5 else 1)
            _place(rng, block, ground, name, group, radius, (-LEAD, last))
            wanted -= group
    return block


def _count(rng: np.random.Generator, kind: Kind) -> int:
    """How many to place: at least one of what is labelled."""
    if not kind.category:
        return int(rng.poisson(kind.count))
    if kind.count > 2:
        return max(1, int(rng.poisson(kind.count)))
    return 1 + int(rng.random() < kind.count - 1)


def _place(rng, block, ground, name, group, radius, span) -> None:
    """Places a single object or a row or crowd of them, if there is room."""
    kind = KINDS.get(name) or SCENERY[name]
    moving = bool(rng.random() < kind.moving and (group == 1 or name == 'pedestrian'))
    template = [_draw(rng, name, kind, moving) for _ in range(group)]
    for _ in range(30):
        x, y = _spot(rng, name, radius)
        if kind.category and ground.hidden(x, y) and rng.random() < 0.7:
            continue
        yaw = _heading(rng, name, x, y)
        if _try(rng, block, ground, name, template, (x, y, yaw), radius, span):
            return


def _spot(rng, name: str, radius: float) -> tuple[float, float]:
    a = rng.uniform(-math.pi, math.pi)
    if name == 'building':
        r = rng.uniform(radius * 0.85, radius + 14)
    elif name in ('wall', 'tree'):
        r = rng.uniform(radius * 0.4, radius + 6)
    else:
        near = 3 if _length(name) < 5 else 9  # what is large would hide all else
        r = near + (radius - near) * rng.random() ** 0.65
    return r * math.cos(a), r * math.sin(a)


def _length(name: str) -> float:
    """Mean length of a kind, metres."""
    return (KINDS.get(name) or SCENERY[name]).size[1]


def _heading(rng, name: str, x: float, y: float) -> float:
    if name in ('pedestrian', 'traffic_cone', 'debris', 'bicycle', 'barrier'):
        return rng.uniform(-math.pi, math.pi)
    return rng.choice([0.0, 0.5, 1.0, 1.5], p=[0.35, 0.15, 0.35, 0.15]) * math.pi + rng.normal(
        0, 0.12
    )


def _draw(rng, name: str, kind: Kind, moving: bool):
    """Size, speed, rider and attribute of one object."""
    rider = name in ('bicycle', 'motorcycle') and (moving or rng.random() < 0.25)
    both, each = rng.normal(0, kind.spread), rng.normal(0, kind.spread / 2, 3)
    size = np.array(kind.size) * np.exp(np.clip(both + each, -2.5 * kind.spread, 2.5 * kind.spread))
    if rider:
        size[2] *= RIDER_HEIGHT
    speed = float(rng.uniform(*kind.speed)) if moving else 0.0
    if name == 'pedestrian':
        attribute = 'pedestrian.moving' if moving else 'pedestrian.standing'
    elif name in ('bicycle', 'motorcycle'):
        attribute = 'cycle.with_rider' if rider else 'cycle.without_rider'
    elif kind.category.startswith('vehicle'):
        still = 'vehicle.parked' if rng.random() < 0.7 else 'vehicle.stopped'
        attribute = 'vehicle.moving' if moving else still
    else:
        attribute = ''
    return tuple(size.round(3).tolist()), speed, rider, attribute


def _try(rng, block, ground, name, template, spot, radius, span) -> bool:
    """Puts a group at a spot; False, and nothing placed, if its first member has no room."""
    x, y, yaw = spot
    placed = 0
    for size, speed, rider, attribute in template:
        width, length, _ = size
        half = (length / 2 + speed * (span[1] - span[0]) / 2, width / 2)
        middle = speed * (span[0] + span[1]) / 2
        cx, cy = x + middle * math.cos(yaw), y + middle * math.sin(yaw)
        inside = not KINDS.get(name) or math.hypot(cx, cy) + speed * span[1] / 2 < radius
        gap = 0.12 if placed and name in ('barrier', 'pedestrian') else 0.3
        if inside and ground.free(cx, cy, yaw, half, gap):
            ground.take(cx, cy, yaw, half)
            solid = make_solid(name, size, rng, rider)
            block.things.append(Thing(name, size, Pose(x, y, yaw), speed, solid, attribute))
            placed += 1
        elif not placed:
            return False
        x, y, yaw = _next(rng, name, (x, y, yaw), size)
    return True


def _next(rng, name, spot, size) -> tuple[float, float, float]:
    """Where the next member of a row or crowd goes."""
    x, y, yaw = spot
    width, length, _ = size
    if name == 'pedestrian':
        a, r = rng.uniform(-math.pi, math.pi), rng.uniform(0.9, 1.8)
        return x + r * math.cos(a), y + r * math.sin(a), yaw + rng.normal(0, 0.5)
    if name == 'barrier':
        step, turn = width + rng.uniform(0.15, 0.4), yaw + math.pi / 2
        return x + step * math.cos(turn), y + step * math.sin(turn), yaw
    step = length + rng.uniform(0.7, 1.6) + (name == 'traffic_cone')
    return x + step * math.cos(yaw), y + step * math.sin(yaw), yaw
