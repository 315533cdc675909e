"""The world before both sensors: objects of constant heading and speed, and the ego car's way.

Everything is in the block's frame: the road runs along x, and the ego car passes the origin
around the middle of the block. ``Block.anchor`` places that frame in the global one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmdet3d_quant.synthetic.kinds import KINDS
from mmdet3d_quant.synthetic.sensors import Pose
from mmdet3d_quant.synthetic.solid import MARGIN, Solid

#: Seconds between key frames.
KEYFRAME_INTERVAL = 0.5


@dataclass
class Thing:
    """One object: a solid that keeps its heading and speed.

    Attributes:
        kind: Name in ``KINDS`` (labelled) or ``SCENERY``.
        size: Width, length, height of the box, metres.
        pose: Middle of its footprint and heading at time 0, in the block's frame.
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
        """Computes the pose at a time, seconds from the block's first key frame."""
        way = self.speed * time
        p = self.pose
        return Pose(p.x + way * math.cos(p.yaw), p.y + way * math.sin(p.yaw), p.yaw)

    @property
    def centre_height(self) -> float:
        """Height of the box's centre above the ground; its bottom lies just below."""
        return self.size[2] / 2 - MARGIN


@dataclass
class Block:
    """A layout and the ego car's way through it.

    Attributes:
        anchor: The block's frame in the global one.
        speed: Speed of the ego car, m/s.
        turn: Yaw rate of the ego car, rad/s.
        middle: Time at which the ego car passes the origin, seconds.
        things: Everything that stands or moves around.
    """

    anchor: Pose
    speed: float
    turn: float
    middle: float
    things: list[Thing]

    def ego(self, time: float) -> Pose:
        """Computes the pose of the ego car in the block's frame."""
        t = time - self.middle
        half, way = self.turn * t / 2, self.speed * t
        return Pose(way * math.cos(half), way * math.sin(half), self.turn * t)
