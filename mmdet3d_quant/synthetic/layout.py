"""Random layouts: the objects around the ego car for a few key frames."""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence

import numpy as np

from mmdet3d_quant.synthetic.kinds import KINDS, SCENERY, Kind
from mmdet3d_quant.synthetic.sensors import Pose
from mmdet3d_quant.synthetic.solid import make_solid
from mmdet3d_quant.synthetic.world import KEYFRAME_INTERVAL, Block, Thing

#: Above this speed (m/s) nuScenes' attributes say that an object moves.
MOVING = 0.2
#: A block begins this many seconds before its first key frame, for that frame's sweeps.
LEAD = 0.5
#: Height with a rider, as a multiple of the height without one.
RIDER_HEIGHT = 1.5
_EGO_BOX = (2.2, 5.0)  # width and length kept free, metres


class _Ground:
    """Occupied ground: the rectangles that the objects placed so far sweep."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, float, float, float]] = []
        self._table = np.zeros((0, 5))

    def free(self, x: float, y: float, yaw: float, half: tuple[float, float], gap: float) -> bool:
        """Tells whether a rectangle (half length, half width) clears all others by a gap."""
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
        """Tells whether an object larger than a car stands between the origin and a point."""
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


class _Plan(NamedTuple):
    """Properties of an object, drawn before it has a place."""

    size: tuple[float, float, float]
    speed: float
    rider: bool
    attribute: str


def make_block(rng: np.random.Generator, frames: int, radius: float) -> Block:
    """Draws a layout.

    Args:
        rng: Source of everything random.
        frames: Key frames that it lasts.
        radius: Labelled objects are within this distance of the origin, metres.
    """
    last = (frames - 1) * KEYFRAME_INTERVAL
    x, y = rng.uniform(300, 1500, 2)
    anchor = Pose(x, y, rng.uniform(-math.pi, math.pi))
    speed = rng.choice([0.0, rng.uniform(1, 9)])
    turn = rng.uniform(-0.12, 0.12) * (speed > 0)
    block = Block(anchor, speed, turn, last / 2, [])
    builder = _Builder(rng, block, radius, (-LEAD, last))
    for name, kind in {**KINDS, **SCENERY}.items():
        wanted = _count(rng, kind)
        while wanted > 0:
            group = int(rng.integers(2, kind.group + 1)) if kind.group > 1 else 1
            group = min(wanted, group if rng.random() < 0.5 else 1)
            builder.place(name, kind, group)
            wanted -= group
    return block


def _count(rng: np.random.Generator, kind: Kind) -> int:
    """Draws how many objects of a kind to place: at least one of a labelled kind."""
    if not kind.category:
        return int(rng.poisson(kind.number))
    if kind.number > 2:
        return max(1, int(rng.poisson(kind.number)))
    return 1 + int(rng.random() < kind.number - 1)


class _Builder:
    """Finds places for things in a block.

    Args:
        rng: Source of everything random.
        block: Receives the things.
        radius: Labelled objects are within this distance of the origin, metres.
        span: First and last moment of the block, seconds.
    """

    def __init__(
        self, rng: np.random.Generator, block: Block, radius: float, span: tuple[float, float]
    ) -> None:
        self.rng, self.block, self.radius, self.span = rng, block, radius, span
        self.ground = _Ground()
        way = block.speed * (span[1] - span[0])
        half = (_EGO_BOX[1] / 2 + way / 2, _EGO_BOX[0] / 2 + 0.3)
        self.ground.take(-block.speed * LEAD / 2, 0, 0, half)

    def place(self, name: str, kind: Kind, group: int) -> None:
        """Places a single object or a row or crowd of them, if there is room."""
        rng = self.rng
        moving = bool(rng.random() < kind.moving and (group == 1 or name == 'pedestrian'))
        plans = [_plan(rng, name, kind, moving) for _ in range(group)]
        for _ in range(30):
            x, y = self._spot(name, kind)
            if kind.category and self.ground.hidden(x, y) and rng.random() < 0.7:
                continue
            if self._try(name, plans, Pose(x, y, _heading(rng, name))):
                return

    def _spot(self, name: str, kind: Kind) -> tuple[float, float]:
        rng, radius = self.rng, self.radius
        a = rng.uniform(-math.pi, math.pi)
        if name == 'building':
            r = rng.uniform(radius * 0.85, radius + 14)
        elif name in ('wall', 'tree'):
            r = rng.uniform(radius * 0.4, radius + 6)
        else:
            near = 3 if kind.size[1] < 5 else 9  # what is large would hide all else
            r = near + (radius - near) * rng.random() ** 0.65
        return r * math.cos(a), r * math.sin(a)

    def _try(self, name: str, plans: Sequence[_Plan], pose: Pose) -> bool:
        """Puts a group at a spot; False, and nothing placed, if its first has no room."""
        begin, end = self.span
        for k, (size, speed, rider, attribute) in enumerate(plans):
            width, length, _ = size
            half = (length / 2 + speed * (end - begin) / 2, width / 2)
            way = speed * (begin + end) / 2
            x, y = pose.x + way * math.cos(pose.yaw), pose.y + way * math.sin(pose.yaw)
            inside = name in SCENERY or math.hypot(x, y) + speed * end / 2 < self.radius
            gap = 0.12 if k and name in ('barrier', 'pedestrian') else 0.3
            if inside and self.ground.free(x, y, pose.yaw, half, gap):
                self.ground.take(x, y, pose.yaw, half)
                solid = make_solid(name, size, self.rng, rider)
                self.block.things.append(Thing(name, size, pose, speed, solid, attribute))
            elif k == 0:
                return False
            pose = _next(self.rng, name, pose, size)
        return True


def _heading(rng: np.random.Generator, name: str) -> float:
    """Draws a heading, radians: along or across the road; any for people and small objects."""
    if name in ('pedestrian', 'traffic_cone', 'debris', 'bicycle', 'barrier'):
        return rng.uniform(-math.pi, math.pi)
    quarter = rng.choice([0.0, 0.5, 1.0, 1.5], p=[0.35, 0.15, 0.35, 0.15])
    return quarter * math.pi + rng.normal(0, 0.12)


def _plan(rng: np.random.Generator, name: str, kind: Kind, moving: bool) -> _Plan:
    rider = name in ('bicycle', 'motorcycle') and (moving or rng.random() < 0.25)
    both, each = rng.normal(0, kind.spread), rng.normal(0, kind.spread / 2, 3)
    limit = 2.5 * kind.spread
    size = np.array(kind.size) * np.exp(np.clip(both + each, -limit, limit))
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
    return _Plan(tuple(size.round(3).tolist()), speed, rider, attribute)


def _next(
    rng: np.random.Generator, name: str, pose: Pose, size: tuple[float, float, float]
) -> Pose:
    """Draws the pose of the next member of a row or crowd."""
    width, length, _ = size
    step, towards, yaw = 0.0, pose.yaw, pose.yaw
    if name == 'pedestrian':
        towards, step = rng.uniform(-math.pi, math.pi), rng.uniform(0.9, 1.8)
        yaw += rng.normal(0, 0.5)
    elif name == 'barrier':
        step, towards = width + rng.uniform(0.15, 0.4), pose.yaw + math.pi / 2
    else:
        step = length + rng.uniform(0.7, 1.6) + (name == 'traffic_cone')
    return Pose(pose.x + step * math.cos(towards), pose.y + step * math.sin(towards), yaw)
