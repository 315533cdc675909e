"""The ground as the cameras see it: its paint, and the light and shadows on it."""

from __future__ import annotations

from typing import Sequence

import cv2
import numpy as np

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.synthetic.light import Light
from mmdet3d_quant.synthetic.sensors import Pose
from mmdet3d_quant.synthetic.world import Thing

GROUND_PIXELS = 512
GROUND_SIZE = 128.0  # side of the painted ground, metres


def paint_ground(rng: np.random.Generator) -> np.ndarray:
    """Paints the albedo of asphalt with patches, lanes along x and verges; float32 (N, N, 3)."""
    n = GROUND_PIXELS
    base = rng.uniform(0.08, 0.25)
    noise = np.zeros((n, n), np.float32)
    for cells in (8, 32, 128, n):
        grid = rng.normal(0, 0.12, (cells, cells)).astype(np.float32)
        noise += cv2.resize(grid, (n, n), interpolation=cv2.INTER_LINEAR)
    ground = np.full((n, n, 3), base, np.float32)
    at = ((np.arange(n) + 0.5) / n - 0.5) * GROUND_SIZE
    tint = np.array([[0.09, 0.12, 0.05], [0.2, 0.18, 0.15], [0.14, 0.14, 0.14]])[rng.integers(3)]
    ground[np.abs(at - rng.normal(0, 2)) > rng.uniform(6, 16)] = tint
    for _ in range(10):  # patches of other tar
        x, y, w, h = rng.uniform((0, 0, 5, 5), (n, n, 50, 50)).astype(int)
        ground[y : y + h, x : x + w] *= rng.uniform(0.6, 1.4)
    dashes = (np.arange(n) // rng.integers(8, 16)) % 2 == 0
    for y in np.arange(-2, 3) * rng.uniform(3, 3.8) + rng.normal(0, 1):
        row = np.argmin(np.abs(at - y))
        ground[row, dashes if rng.random() < 0.7 else slice(None)] = rng.uniform(0.4, 0.8)
    return ground * np.clip(1 + noise, 0.3, 2)[..., None]


def lit_ground(
    ground: np.ndarray,
    light: Light,
    things: Sequence[Thing],
    poses: Sequence[Pose],
    lamps: np.ndarray,
    ego: Pose,
) -> np.ndarray:
    """Computes the light that the ground reflects, with shadows.

    Args:
        ground: Albedo, (N, N, 3), of the square around the block's origin: rows along y,
            columns along x.
        light: Light of the block.
        things: Objects, which cast shadows.
        poses: Pose of each object.
        lamps: Positions of street lamps, (L, 2).
        ego: Pose of the ego car.

    Returns:
        Linear light, float32 (N, N, 3).
    """
    scale = GROUND_PIXELS / GROUND_SIZE
    shade = np.zeros((GROUND_PIXELS, GROUND_PIXELS), np.uint8)
    slope = light.sun[:2] / max(light.sun[2], 0.25) if light.direct.any() else np.zeros(2)
    for thing, pose in strict_zip(things, poses):
        width, length, height = thing.size
        x, y = length / 2, width / 2
        corners = np.array([[x, y, 0], [x, -y, 0], [-x, -y, 0], [-x, y, 0]])
        foot = pose.apply(corners)[:, :2]
        if thing.kind in ('pole', 'tree'):  # only the shadow of the stem, and what is on top
            foot = (foot - foot.mean(0)) * 0.3 + foot.mean(0)
        cast = np.concatenate([foot, foot - slope * min(height, 4.0)])
        pixels = ((cast + GROUND_SIZE / 2) * scale * 16).astype(np.int32)
        cv2.fillConvexPoly(shade, cv2.convexHull(pixels), (1,), shift=4)
    sunny = light.direct * light.sun[2] if light.direct.any() else np.zeros(3)
    lit = np.where(shade[..., None], light.ambient * 0.6, light.ambient + sunny)
    if light.head:
        side = GROUND_PIXELS // 4
        at = ((np.arange(side) + 0.5) / side - 0.5) * GROUND_SIZE
        points = np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2)
        extra = light.on(points, lamps, ego).reshape(side, side).astype(np.float32)
        lit = lit + cv2.resize(extra, shade.shape)[..., None]
    return (ground * lit).astype(np.float32)
