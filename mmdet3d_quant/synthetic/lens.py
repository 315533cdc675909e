"""Effects of a camera's lens and sensor: bloom, glare of the sun, noise."""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np

from mmdet3d_quant.synthetic.light import Light
from mmdet3d_quant.synthetic.sensors import Camera, Pose


@lru_cache(maxsize=2)
def _grain(height: int, width: int) -> np.ndarray:
    """Generates noise to cut pieces from: unit variance, float32 (H + 64, W + 64, 3)."""
    rng = np.random.default_rng(0)
    return rng.normal(0, 1, (height + 64, width + 64, 3)).astype(np.float32)


def expose(
    image: np.ndarray, camera: Camera, ego: Pose, light: Light, rng: np.random.Generator
) -> np.ndarray:
    """Adds the effects of lens and sensor: bloom, the glare of the sun, noise.

    Args:
        image: uint8 (H, W, 3).
        camera: The camera that took it.
        ego: Pose of the ego car in the block's frame.
        light: The block's light.
        rng: Source of noise.
    """
    height, width = image.shape[:2]
    small = cv2.resize(image, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    # cv2's stubs do not know that a scalar may be subtracted.
    bright = cv2.subtract(small, (200, 200, 200, 0))  # type: ignore[call-overload]
    bright = cv2.GaussianBlur(bright, (0, 0), 4)
    bloom = bright.astype(np.float32) * 1.5
    if light.glare:
        yaw = ego.yaw + math.radians(camera.yaw)
        c, s = math.cos(yaw), math.sin(yaw)
        ahead = light.sun[0] * c + light.sun[1] * s
        right = light.sun[0] * s - light.sun[1] * c
        if ahead > 0.2:
            matrix = camera.intrinsics(width // 4)
            u = matrix[0, 0] * right / ahead + matrix[0, 2]
            v = matrix[1, 2] - matrix[0, 0] * light.sun[2] / ahead
            x = np.arange(width // 4) - u
            y = np.arange(height // 4) - v
            square = (x[None] ** 2 + y[:, None] ** 2) / (width / 4) ** 2
            sun = 300 * np.exp(-square / 0.004) + 110 * np.exp(-square / 0.06)
            bloom += (light.glare * sun).astype(np.float32)[..., None]
    image = cv2.add(image, cv2.resize(bloom.clip(0, 255).astype(np.uint8), (width, height)))
    x, y = rng.integers(0, 64, 2)
    grain = _grain(height, width)[y : y + height, x : x + width]
    return cv2.add(image, grain * np.float32(light.noise), dtype=cv2.CV_8U)
