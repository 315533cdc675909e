"""Solids: shapes scaled and coloured, as the arrays that both sensors draw from.

Colour does not give a class away: the colour of every material that covers a large part of an
object is drawn from one distribution for all classes. Exceptions are tyres, glass, lamps and
plates, which many classes share.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Tuple

import numpy as np

from mmdet3d_quant.synthetic.parts import AROUND, FACES, Shape
from mmdet3d_quant.synthetic.shapes import SHAPES

#: Gap between an object's surface and its annotated box, metres: LiDAR noise stays inside.
MARGIN = 0.03
#: Corners of a face, as 1 for the upper end along each axis, for faces across x, y and z.
_CORNERS = np.array(
    [
        [[0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]],
        [[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]],
        [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]],
    ],
    dtype=bool,
)
#: Red, green, blue, 0 to 1.
Colour = Tuple[float, ...]
_GLOWS = ('none', 'head lamp', 'tail lamp', 'window', 'lamp', 'beacon')


@dataclass
class Solid:
    """Parts and faces of one object in its own frame: x ahead, y left, z up from the ground.

    Attributes:
        low: Lower corners of the parts, (P, 3), metres.
        high: Upper corners of the parts, (P, 3).
        reflectivity: Share of a LiDAR pulse that each part returns, (P,); above 1 for
            retroreflectors.
        quads: Faces and the patches on them, (Q, 4, 3), in painting order for one part.
        normals: Outward normals, (Q, 3).
        albedo: Red, green, blue, (Q, 3), 0 to 1.
        glow: Index into ``GLOWS`` of each quad's kind of lamp, (Q,).
        part: Part of each quad, (Q,).
    """

    low: np.ndarray
    high: np.ndarray
    reflectivity: np.ndarray
    quads: np.ndarray
    normals: np.ndarray
    albedo: np.ndarray
    glow: np.ndarray
    part: np.ndarray


GLOWS = {name: k for k, name in enumerate(_GLOWS)}


def random_colour(rng: np.random.Generator) -> Colour:
    """Draws a colour from the one wide distribution that all objects share."""
    value = float(np.clip(rng.lognormal(-1.2, 0.7), 0.02, 0.9))
    saturation = rng.beta(0.8, 1.6)
    return colorsys.hsv_to_rgb(rng.random(), saturation, value)


def make_palette(rng: np.random.Generator) -> dict[str, tuple[Colour, float]]:
    """Draws colour and LiDAR reflectivity of each material, for one object."""
    palette: dict[str, tuple[Colour, float]] = {}
    for name in ('body', 'second', 'third', 'fourth', 'skin', 'collar', 'sign'):
        colour = random_colour(rng)
        palette[name] = colour, float(np.clip(rng.lognormal(-2.6, 0.9), 0.003, 0.8))
    body, collar = palette['body'], palette['collar'][0]
    if abs(sum(collar) - sum(body[0])) < 0.6:  # stripes show, dark on light or light on dark
        collar = tuple(0.02 + 0.05 * c if sum(body[0]) > 0.8 else 0.5 + 0.4 * c for c in collar)
    retro = rng.lognormal(0.5, 0.6) if rng.random() < 0.5 else palette['collar'][1]
    grey = rng.uniform(0.015, 0.05)
    palette['collar'] = collar, float(retro)
    palette['tyre'] = (grey,) * 3, 0.015
    palette['dark'] = (grey * 1.5,) * 3, 0.03
    palette['rib'] = tuple(0.45 * c for c in body[0]), body[1]
    palette['dirt'] = tuple(0.75 * c for c in body[0]), body[1]
    palette['pale'] = tuple(0.85 * c + 0.06 for c in body[0]), body[1]
    palette['sticker'] = random_colour(rng), body[1]
    palette['glass'] = (0.03, 0.04, 0.05), 0.01
    palette['window'] = (0.05, 0.07, 0.08), 0.01
    palette['plate'] = (0.6, 0.6, 0.5), float(rng.lognormal(0.9, 0.6))
    palette['head lamp'] = (0.8, 0.8, 0.75), 0.3
    palette['tail lamp'] = (0.4, 0.03, 0.03), 0.5
    palette['lamp'] = (0.5, 0.5, 0.4), 0.1
    palette['beacon'] = (0.7, 0.35, 0.02), 0.2
    green = rng.uniform(0.5, 1.5)
    leaf = (0.07 * green, 0.11 * rng.uniform(0.7, 1.6) * green, 0.03 * green)
    palette['leaf'] = leaf, rng.uniform(0.03, 0.2)
    palette['second leaf'] = tuple(rng.uniform(0.3, 0.7) * c for c in leaf), 0.05
    return palette


def make_solid(
    kind: str, size: tuple[float, float, float], rng: np.random.Generator, rider: bool = False
) -> Solid:
    """Builds one object.

    Args:
        kind: A name in ``SHAPES``.
        size: Width, length, height of its annotated box, metres.
        rng: Source of its details and colours.
        rider: Whether somebody rides it.
    """
    shape = SHAPES[kind](rng, rider)
    _wear(shape, rng)
    palette = make_palette(rng)
    boxes = np.array([p[:6] for p in shape.parts])
    width, length, height = size
    scale = np.array([length - 2 * MARGIN, width - 2 * MARGIN, height - 2 * MARGIN])
    low, high = boxes[:, 0::2] * scale, boxes[:, 1::2] * scale
    corners, normals, part, materials = _faces(shape, low, high)
    albedo = np.array([palette[m][0] for m in materials])
    return Solid(
        low=low,
        high=high,
        reflectivity=np.array([palette[p[6]][1] for p in shape.parts]),
        quads=corners,
        normals=normals,
        albedo=albedo * rng.uniform(0.9, 1.1, (len(albedo), 1)),
        glow=np.array([GLOWS.get(m, 0) for m in materials]),
        part=part,
    )


def _wear(shape: Shape, rng: np.random.Generator) -> None:
    """Adds dirt and stickers, to objects of any kind."""
    extents = np.array([p[:6] for p in shape.parts])
    large = np.argsort(-np.prod(extents[:, 1::2] - extents[:, 0::2], axis=1))[:2]
    for part in large:
        for face in AROUND:
            for u, v in rng.uniform(0, 0.85, (rng.integers(0, 4), 2)):
                w, h = rng.uniform(0.03, 0.4, 2)
                material = str(rng.choice(['dirt', 'pale', 'sticker'], p=[0.5, 0.3, 0.2]))
                patch = (part, face, u, min(1.0, u + w), v, min(1.0, v + h), material)
                shape.patches.insert(0, patch)


def _faces(shape: Shape, low: np.ndarray, high: np.ndarray):
    """Makes corners (Q, 4, 3), normals (Q, 3), parts (Q,), materials of faces, then patches."""
    rows = [
        (k, face, 0.0, 1.0, 0.0, 1.0, p[6]) for k, p in enumerate(shape.parts) for face in FACES
    ] + shape.patches
    part = np.array([r[0] for r in rows])
    face = np.array([FACES.index(r[1]) for r in rows])
    axis, upper = face // 2, face % 2 == 0
    begin, end = np.zeros((len(rows), 3)), np.ones((len(rows), 3))
    index = np.arange(len(rows))
    uv = np.array([r[2:6] for r in rows])
    others = np.array([[1, 2], [0, 2], [0, 1]])[axis]
    for k in range(2):
        begin[index, others[:, k]], end[index, others[:, k]] = uv[:, 2 * k], uv[:, 2 * k + 1]
    begin[index, axis] = end[index, axis] = upper
    extent = (high - low)[part]
    begin, end = low[part] + begin * extent, low[part] + end * extent
    corners = np.where(_CORNERS[axis], end[:, None], begin[:, None])
    normals = np.zeros((len(rows), 3))
    normals[index, axis] = np.where(upper, 1.0, -1.0)
    return corners, normals, part, [r[6] for r in rows]
