"""The cameras: faces of parts, painted from far to near, then what a lens and a sensor add.

The order is exact where two things can be told apart by a plane, which parts that do not overlap
always can: what lies on the camera's side of the plane is painted later.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Sequence

import cv2
import numpy as np

from mmdet3d_quant.synthetic.light import Light
from mmdet3d_quant.synthetic.sensors import CAMERAS, Camera, Pose
from mmdet3d_quant.synthetic.world import Block, Thing

NEAR = 0.15
GROUND_PIXELS = 512
GROUND_SIZE = 128.0  # side of the painted ground, metres
_SHIFT = 4  # bits of the fraction in pixel coordinates


def encode(light: np.ndarray) -> np.ndarray:
    """Turns linear light into grey levels 0 to 255 (uint8) by a square root."""
    return (np.sqrt(np.clip(light, 0, 1)) * 255 + 0.5).astype(np.uint8)


class Scene:
    """A block prepared for its pictures: the ground's paint and all faces in one array."""

    def __init__(self, block: Block, light: Light, rng: np.random.Generator) -> None:
        self.block, self.light = block, light
        self.ground = paint_ground(rng)
        self.clouds = rng.normal(0, 0.07, (4, 9)).astype(np.float32)
        solids = [t.solid for t in block.things]
        sizes = [len(s.low) for s in solids]
        offsets = np.cumsum([0, *sizes[:-1]])
        self.thing = np.repeat(np.arange(len(solids)), [len(s.part) for s in solids])
        self.part = np.concatenate([s.part + o for s, o in zip(solids, offsets, strict=True)])
        self.quads = np.concatenate([s.quads for s in solids])
        self.normals = np.concatenate([s.normals for s in solids])
        self.albedo = np.concatenate([s.albedo for s in solids])
        self.glow = np.concatenate([s.glow for s in solids])
        self.first_part, self.num_parts = offsets, sum(sizes)

    def frame(self, time: float, width: int) -> list[np.ndarray]:
        """The six pictures at a time, uint8 (H, W, 3) in the order blue, green, red."""
        things = self.block.things
        poses = [t.at(time) for t in things]
        ego = self.block.ego(time)
        at_poles = [(p.x, p.y) for k, p in enumerate(poses) if things[k].kind == 'pole']
        lamps = np.array(at_poles).reshape(-1, 2)
        c = np.cos([p.yaw for p in poses])[self.thing]
        s = np.sin([p.yaw for p in poses])[self.thing]
        spot = np.array([[p.x, p.y] for p in poses])
        quads, normals = self.quads.copy(), self.normals.copy()
        x, y = self.quads[..., 0], self.quads[..., 1]
        quads[..., 0] = c[:, None] * x - s[:, None] * y + spot[self.thing, :1]
        quads[..., 1] = s[:, None] * x + c[:, None] * y + spot[self.thing, 1:]
        normals[:, 0] = c * self.normals[:, 0] - s * self.normals[:, 1]
        normals[:, 1] = s * self.normals[:, 0] + c * self.normals[:, 1]
        colour = self._shade(spot, normals, lamps, ego)
        ground = self._lit_ground(things, poses, lamps, ego)
        return [
            self._picture(camera, gain, width, ego, poses, quads, normals, colour, ground)
            for camera, gain in zip(CAMERAS, self.light.exposure, strict=True)
        ]

    def _shade(self, spot, normals, lamps, ego: Pose) -> np.ndarray:
        """Linear colour of each face, (Q, 3), before exposure and haze."""
        light = self.light
        lambert = np.clip(normals @ light.sun, 0, 1)
        extra = light.on(spot, lamps, ego)[self.thing]
        side = 0.75 + 0.25 * normals[:, 2]  # what faces the sky gets more of it
        total = light.ambient * side[:, None] + light.direct * lambert[:, None] + extra[:, None]
        return self.albedo * total + light.glow[self.glow]

    def _lit_ground(self, things: Sequence[Thing], poses, lamps, ego: Pose) -> np.ndarray:
        """The ground as lit, with shadows; float32 (N, N, 3), linear."""
        light = self.light
        scale = GROUND_PIXELS / GROUND_SIZE
        shade = np.zeros((GROUND_PIXELS, GROUND_PIXELS), np.uint8)
        slope = light.sun[:2] / max(light.sun[2], 0.25) if light.direct.any() else np.zeros(2)
        for thing, pose in zip(things, poses, strict=True):
            width, length, height = thing.size
            x, y = length / 2, width / 2
            corners = np.array([[x, y, 0], [x, -y, 0], [-x, -y, 0], [-x, y, 0]])
            foot = pose.apply(corners)[:, :2]
            if thing.kind in ('pole', 'tree'):  # only the shadow of the stem, and what is on top
                foot = (foot - foot.mean(0)) * 0.3 + foot.mean(0)
            cast = np.concatenate([foot, foot - slope * min(height, 4.0)])
            pixels = ((cast + GROUND_SIZE / 2) * scale * 16).astype(np.int32)
            cv2.fillConvexPoly(shade, cv2.convexHull(pixels), 1, shift=4)
        sunny = light.direct * light.sun[2] if light.direct.any() else np.zeros(3)
        lit = np.where(shade[..., None], light.ambient * 0.6, light.ambient + sunny)
        if light.head:
            side = GROUND_PIXELS // 4
            at = ((np.arange(side) + 0.5) / side - 0.5) * GROUND_SIZE
            points = np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2)
            extra = light.on(points, lamps, ego).reshape(side, side).astype(np.float32)
            lit = lit + cv2.resize(extra, shade.shape)[..., None]
        return (self.ground * lit).astype(np.float32)

    def _picture(self, camera, gain, width, ego, poses, quads, normals, colour, ground):
        height = width * 9 // 16
        matrix = camera.intrinsics(width)
        pose = ego @ Pose(camera.translation[0], camera.translation[1], math.radians(camera.yaw))
        eye = np.array([pose.x, pose.y, camera.translation[2]])
        c, s = math.cos(pose.yaw), math.sin(pose.yaw)
        rotation = np.array([[s, 0, c], [-c, 0, s], [0, -1, 0]])  # camera axes in columns
        fog = self.light.sky[0] * gain
        image = self._backdrop(matrix, eye, rotation, gain, fog, (height, width), ground)

        seen = self._visible(quads, normals, eye, rotation, matrix, width)
        things = np.unique(self.thing[seen])
        rank = self._ranks(things, poses, eye)
        order = seen[np.lexsort((seen, rank[self.part[seen]]))]
        points = (quads[order] - eye) @ rotation
        clear = np.exp(-points[:, :, 2].mean(1) / self.light.haze)[:, None]
        paint = encode(colour[order] * gain * clear + fog * (1 - clear))[:, ::-1].tolist()
        whole = points[:, :, 2].min(axis=1) > NEAR
        pixels = project(np.maximum(points, [-np.inf, -np.inf, NEAR]), matrix)
        for k, tint in enumerate(paint):
            polygon = pixels[k] if whole[k] else project(_clip(points[k]), matrix)
            cv2.fillConvexPoly(image, polygon, tint, lineType=cv2.LINE_AA, shift=_SHIFT)
        return image

    def _backdrop(self, matrix, eye, rotation, gain, fog, size, ground) -> np.ndarray:
        """Sky and ground."""
        height, width = size
        horizon = int(math.ceil(matrix[1, 2]))
        rise = (matrix[1, 2] - np.arange(horizon)) / matrix[0, 0]
        blend = np.clip(rise / 0.45, 0, 1)[:, None, None]
        clouds = 1 + cv2.resize(self.clouds, (width, horizon), interpolation=cv2.INTER_CUBIC)
        low, high = self.light.sky * gain
        sky = (low * (1 - blend) + high * blend) * clouds[..., None]
        # From a pixel to the ground: the ray (x, y, 1) meets it at distance eye_z / y.
        scale = GROUND_PIXELS / GROUND_SIZE
        ray = rotation @ np.linalg.inv(matrix)
        to_ground = np.array(
            [
                eye[2] * ray[0] - eye[0] * ray[2],
                eye[2] * ray[1] - eye[1] * ray[2],
                -ray[2],
            ]
        )
        to_texture = np.array(
            [[scale, 0, GROUND_PIXELS / 2 - 0.5], [0, scale, GROUND_PIXELS / 2 - 0.5], [0, 0, 1]]
        )
        below = np.array([[1, 0, 0.5], [0, 1, horizon + 1.5], [0, 0, 1]])
        floor = cv2.warpPerspective(
            ground,
            to_texture @ to_ground @ below,
            (width, height - horizon - 1),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        drop = np.arange(horizon + 1, height) + 0.5 - matrix[1, 2]
        clear = np.exp(-matrix[0, 0] * eye[2] / np.maximum(drop, 0.1) / self.light.haze)
        clear = clear.astype(np.float32)[:, None, None]
        floor *= clear * np.float32(gain)
        floor += (1 - clear) * fog.astype(np.float32)
        rows = [encode(sky), encode(floor[:1]), encode(floor)]
        return np.ascontiguousarray(np.concatenate(rows)[..., ::-1])

    def _visible(self, quads, normals, eye, rotation, matrix, width) -> np.ndarray:
        """Indices of the faces that look at the camera and lie in its field of view."""
        facing = np.einsum('qi,qi->q', normals, eye - quads[:, 0]) > 0
        index = np.nonzero(facing)[0]
        points = (quads[index] - eye) @ rotation
        x, z = points[..., 0], points[..., 2]
        left, right = matrix[0, 2] / matrix[0, 0], (width - matrix[0, 2]) / matrix[0, 0]
        keep = (z > NEAR).any(axis=1) & (x > -left * z).any(axis=1) & (x < right * z).any(axis=1)
        across = np.abs(points - points.mean(axis=1, keepdims=True)).max(axis=(1, 2))
        keep &= across * matrix[0, 0] > 0.25 * np.abs(z).min(axis=1)  # too small to show
        return index[keep]

    def _ranks(self, visible: np.ndarray, poses, eye: np.ndarray) -> np.ndarray:
        """Painting rank of each part, (P,); -1 for parts of things out of view."""
        rank = np.full(self.num_parts, -1)
        things = [self.block.things[k] for k in visible]
        shown = [poses[k] for k in visible]
        order = paint_order(*_things_before(things, shown, eye))
        count = 0
        for k in order:
            solid, pose = things[k].solid, shown[k]
            c, s = math.cos(pose.yaw), math.sin(pose.yaw)
            dx, dy = eye[0] - pose.x, eye[1] - pose.y
            local = np.array([c * dx + s * dy, -s * dx + c * dy, eye[2]])
            parts = paint_order(*_parts_before(solid.low, solid.high, local))
            first = self.first_part[visible[k]]
            rank[first + np.array(parts)] = np.arange(count, count + len(parts))
            count += len(parts)
        return rank


def project(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Pixels of points in the camera frame, as int32 with ``_SHIFT`` bits of fraction.

    OpenCV has the centre of the first pixel at 0, the camera matrix its upper left corner.
    """
    pixels = points @ matrix.T
    pixels = pixels[..., :2] / pixels[..., 2:] - 0.5
    return np.round(np.clip(pixels, -8000, 8000) * (1 << _SHIFT)).astype(np.int32)


def _clip(points: np.ndarray) -> np.ndarray:
    """Cuts a polygon (N, 3) off in front of the camera."""
    kept = []
    for a, b in zip(points, np.roll(points, -1, axis=0), strict=True):
        if a[2] > NEAR:
            kept.append(a)
        if (a[2] > NEAR) != (b[2] > NEAR):
            kept.append(a + (b - a) * (NEAR - a[2]) / (b[2] - a[2]))
    return np.array(kept)


def paint_order(before: np.ndarray, distance: np.ndarray) -> list[int]:
    """An order in which ``i`` comes before ``j`` wherever ``before[i, j]``, else far to near.

    Args:
        before: (N, N) of bool. Circles in it, which overlapping boxes can give, are cut at the
            farthest.
        distance: (N,), metres.
    """
    needs = [sum(1 << int(i) for i in np.nonzero(column)[0]) for column in before.T]
    left = sorted(range(len(distance)), key=lambda k: -distance[k])
    waiting, order = (1 << len(distance)) - 1, []
    while left:
        pick = next((k for k in left if not needs[k] & waiting & ~(1 << k)), left[0])
        left.remove(pick)
        waiting &= ~(1 << pick)
        order.append(pick)
    return order


def _parts_before(low, high, eye) -> tuple[np.ndarray, np.ndarray]:
    """Which boxes along the axes go before which, and their distances from the eye."""
    eps = 1e-6
    before = np.zeros((len(low), len(low)), dtype=bool)
    for axis in range(3):
        beyond = low[None, :, axis] >= high[:, None, axis] - eps  # j lies above i along the axis
        above = (eye[axis] >= high[:, axis])[:, None]
        before |= beyond & above  # the eye is on j's side of i's upper face
        before |= (beyond & ~above).T
    middle = (low + high) / 2
    return before & ~before.T, np.linalg.norm(middle - eye, axis=1)


def _things_before(things, poses, eye) -> tuple[np.ndarray, np.ndarray]:
    """The same for upright boxes of any heading, apart from each other on the ground."""
    half = np.array([[t.size[1] / 2, t.size[0] / 2] for t in things]).reshape(-1, 2)
    spot = np.array([[p.x, p.y] for p in poses]).reshape(-1, 2)
    yaw = np.array([p.yaw for p in poses])
    ahead = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1)
    axes = np.stack([ahead, np.stack([-ahead[:, 1], ahead[:, 0]], axis=-1)], axis=1)  # (N, 2, 2)
    signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]])
    corners = spot[:, None] + np.einsum('cn,jn,jnk->jck', signs, half, axes)
    local = np.einsum('iak,ijck->ijca', axes, corners[None] - spot[:, None, None])
    view = np.einsum('iak,ik->ia', axes, eye[:2] - spot)
    before = np.zeros((len(things), len(things)), dtype=bool)
    for axis in range(2):
        for sign in (1, -1):
            beyond = (sign * local[..., axis]).min(axis=2) >= half[:, None, axis] - 1e-6
            outside = (sign * view[:, axis] >= half[:, axis])[:, None]
            before |= beyond & outside
            before |= (beyond & ~outside).T
    return before & ~before.T, np.linalg.norm(spot - eye[:2], axis=1)


def paint_ground(rng: np.random.Generator) -> np.ndarray:
    """Albedo of the ground: asphalt with patches, lanes along x, verges; float32 (N, N, 3)."""
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


@lru_cache(maxsize=2)
def _grain(height: int, width: int) -> np.ndarray:
    """Noise to cut pieces from: unit variance, float32 (H + 64, W + 64, 3)."""
    rng = np.random.default_rng(0)
    return rng.normal(0, 1, (height + 64, width + 64, 3)).astype(np.float32)


def expose(
    image: np.ndarray, camera: Camera, ego: Pose, light: Light, rng: np.random.Generator
) -> np.ndarray:
    """Adds what lens and sensor do: bloom, the glare of the sun, noise.

    Args:
        image: uint8 (H, W, 3).
        camera: The camera that took it.
        ego: Pose of the ego car in the block's frame.
        light: The block's light.
        rng: Source of noise.
    """
    height, width = image.shape[:2]
    small = cv2.resize(image, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    bright = cv2.GaussianBlur(cv2.subtract(small, (200, 200, 200, 0)), (0, 0), 4)
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
