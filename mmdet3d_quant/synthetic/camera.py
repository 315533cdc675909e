"""Camera images: faces of parts, painted from far to near over sky and ground."""

from __future__ import annotations

import math

import cv2
import numpy as np

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.synthetic.ground import GROUND_PIXELS, GROUND_SIZE, lit_ground, paint_ground
from mmdet3d_quant.synthetic.light import Light
from mmdet3d_quant.synthetic.order import paint_order, parts_before, things_before
from mmdet3d_quant.synthetic.sensors import CAMERAS, Pose
from mmdet3d_quant.synthetic.world import Block

NEAR = 0.15
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
        self.part = np.concatenate([s.part + o for s, o in strict_zip(solids, offsets)])
        self.quads = np.concatenate([s.quads for s in solids])
        self.normals = np.concatenate([s.normals for s in solids])
        self.albedo = np.concatenate([s.albedo for s in solids])
        self.glow = np.concatenate([s.glow for s in solids])
        self.first_part, self.num_parts = offsets, sum(sizes)

    def frame(self, time: float, width: int) -> list[np.ndarray]:
        """Paints the six images at a time, uint8 (H, W, 3) in the order blue, green, red."""
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
        ground = lit_ground(self.ground, self.light, things, poses, lamps, ego)
        return [
            self._picture(camera, gain, width, ego, poses, quads, normals, colour, ground)
            for camera, gain in strict_zip(CAMERAS, self.light.exposure)
        ]

    def _shade(self, spot, normals, lamps, ego: Pose) -> np.ndarray:
        """Computes the linear colour of each face, (Q, 3), before exposure and haze."""
        light = self.light
        lambert = np.clip(normals @ light.sun, 0, 1)
        extra = light.on(spot, lamps, ego)[self.thing]
        side = 0.75 + 0.25 * normals[:, 2]  # what faces the sky gets more of it
        total = light.ambient * side[:, None] + light.direct * lambert[:, None] + extra[:, None]
        return self.albedo * total + light.glow[self.glow]

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
        """Paints sky and ground, uint8 (H, W, 3)."""
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
        """Finds the indices of the faces that look at the camera and lie in its field of view."""
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
        """Computes the painting rank of each part, (P,); -1 for parts of things out of view."""
        rank = np.full(self.num_parts, -1)
        things = [self.block.things[k] for k in visible]
        shown = [poses[k] for k in visible]
        order = paint_order(*things_before(things, shown, eye))
        count = 0
        for k in order:
            solid, pose = things[k].solid, shown[k]
            c, s = math.cos(pose.yaw), math.sin(pose.yaw)
            dx, dy = eye[0] - pose.x, eye[1] - pose.y
            local = np.array([c * dx + s * dy, -s * dx + c * dy, eye[2]])
            parts = paint_order(*parts_before(solid.low, solid.high, local))
            first = self.first_part[visible[k]]
            rank[first + np.array(parts)] = np.arange(count, count + len(parts))
            count += len(parts)
        return rank


def project(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Projects points in the camera frame to pixels, int32 with ``_SHIFT`` bits of fraction.

    OpenCV has the centre of the first pixel at 0, the camera matrix its upper left corner.
    """
    pixels = points @ matrix.T
    pixels = pixels[..., :2] / pixels[..., 2:] - 0.5
    return np.round(np.clip(pixels, -8000, 8000) * (1 << _SHIFT)).astype(np.int32)


def _clip(points: np.ndarray) -> np.ndarray:
    """Clips a polygon (N, 3) at the plane ``NEAR`` in front of the camera."""
    kept = []
    for a, b in strict_zip(points, np.roll(points, -1, axis=0)):
        if a[2] > NEAR:
            kept.append(a)
        if (a[2] > NEAR) != (b[2] > NEAR):
            kept.append(a + (b - a) * (NEAR - a[2]) / (b[2] - a[2]))
    return np.array(kept)
