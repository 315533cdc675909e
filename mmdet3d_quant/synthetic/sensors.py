"""The rig: nuScenes' six cameras and its 32-beam LiDAR, close to where the real car has them.

Frames: the ego frame looks along +x with +y to the left and +z up, its origin on the ground. The
LiDAR frame is the ego frame turned by -90 degrees: it looks along +y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from pyquaternion import Quaternion

#: Width in pixels of the real images, for which the intrinsics below hold; they are 16:9.
REAL_WIDTH = 1600
LIDAR = 'LIDAR_TOP'
LIDAR_TRANSLATION = (0.943713, 0.0, 1.84023)
LIDAR_ROTATION = Quaternion(axis=[0, 0, 1], degrees=-90)
#: Elevation of the 32 beams in radians, lowest first.
ELEVATIONS = np.radians(np.linspace(-30.67, 10.67, 32))
#: Rays per turn of each beam.
AZIMUTHS = 1080
#: LiDAR returns come from at most this far, in metres.
LIDAR_RANGE = 50.0

_AHEAD = Quaternion(0.5, -0.5, 0.5, -0.5)  # camera axes (right, down, ahead) in the ego frame


@dataclass(frozen=True)
class Camera:
    """Position and projection of a camera.

    Attributes:
        name: Channel, such as ``CAM_FRONT``.
        translation: Position in the ego frame, metres.
        yaw: Viewing direction, degrees counterclockwise from straight ahead.
        focal: Focal length in pixels of the real image.
        centre: Principal point (x, y) in pixels of the real image.
    """

    name: str
    translation: tuple[float, float, float]
    yaw: float
    focal: float
    centre: tuple[float, float]

    @property
    def rotation(self) -> Quaternion:
        """From camera axes (right, down, ahead) to the ego frame."""
        return Quaternion(axis=[0, 0, 1], degrees=self.yaw) * _AHEAD

    def intrinsics(self, width: int) -> np.ndarray:
        """Computes the camera matrix (3, 3) for images of a width, in pixels."""
        scale = width / REAL_WIDTH
        x, y = self.centre
        return np.array(
            [[self.focal * scale, 0, x * scale], [0, self.focal * scale, y * scale], [0, 0, 1]]
        )


CAMERAS = (
    Camera('CAM_FRONT', (1.70, 0.016, 1.511), 0, 1266, (816, 491)),
    Camera('CAM_FRONT_RIGHT', (1.55, -0.49, 1.496), -56, 1260, (807, 495)),
    Camera('CAM_FRONT_LEFT', (1.52, 0.49, 1.509), 55, 1272, (826, 479)),
    Camera('CAM_BACK', (0.028, 0.003, 1.579), 180, 809, (829, 481)),
    Camera('CAM_BACK_LEFT', (1.036, 0.485, 1.591), 108, 1256, (792, 492)),
    Camera('CAM_BACK_RIGHT', (1.015, -0.481, 1.562), -111, 1259, (807, 501)),
)


@dataclass(frozen=True)
class Pose:
    """A pose on the flat ground: position (x, y) in metres and yaw in radians."""

    x: float
    y: float
    yaw: float

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Transforms points (..., 3) from this pose's frame to its parent's."""
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        x, y = points[..., 0], points[..., 1]
        return np.stack([c * x - s * y + self.x, s * x + c * y + self.y, points[..., 2]], axis=-1)

    def __matmul__(self, other: Pose) -> Pose:
        """Transforms the pose ``other`` from this pose's frame to its parent's."""
        x, y, _ = self.apply(np.array([other.x, other.y, 0.0]))
        return Pose(float(x), float(y), self.yaw + other.yaw)

    @property
    def rotation(self) -> Quaternion:
        return Quaternion(axis=[0, 0, 1], radians=self.yaw)
