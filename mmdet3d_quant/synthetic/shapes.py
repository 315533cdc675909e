"""Shapes of two-wheelers, people, small objects and scenery, and the table of all shapes.

``parts.py`` has the notation. Each shape is drawn by a function of a random generator and of a flag
for a rider, which only two-wheelers use.
"""

from __future__ import annotations

from typing import Callable

import numpy as np

from mmdet3d_quant.synthetic.parts import AROUND, SIDES, Shape
from mmdet3d_quant.synthetic.vehicles import bus, car, construction_vehicle, trailer, truck


def motorcycle(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    k = 0.66 if rider else 1.0  # with a rider the box is taller
    s.part(-0.5, -0.22, -0.12, 0.12, 0, 0.5 * k, 'tyre')
    s.part(0.24, 0.5, -0.12, 0.12, 0, 0.5 * k, 'tyre')
    body = s.part(-0.22, 0.24, -0.3, 0.3, 0.14 * k, 0.6 * k, 'dark')
    s.patch(body, SIDES, 0.1, 0.6, 0.1, 0.5, 'rib')  # the engine
    s.part(-0.02, 0.26, -0.22, 0.22, 0.6 * k, 0.8 * k, 'body')
    s.part(-0.46, -0.02, -0.2, 0.2, 0.6 * k, 0.72 * k, 'second')
    fork = s.part(0.26, 0.36, -0.2, 0.2, 0.5 * k, 0.84 * k, 'body')
    s.part(0.2, 0.3, -0.5, 0.5, 0.84 * k, 0.9 * k, 'dark')
    s.part(0.26, 0.32, -0.2, 0.2, 0.9 * k, k if not rider else 0.68, 'glass')
    s.part(-0.5, -0.48, -0.12, 0.12, 0.5 * k, 0.6 * k, 'plate')
    s.patch(fork, '+x', 0.15, 0.85, 0.2, 0.8, 'head lamp')
    s.patch(5, '-x', 0.2, 0.8, 0, 0.8, 'tail lamp')
    if rider:
        _rider(s, -0.26, 0.04, 0.72 * k, width=0.42)
    return s


def bicycle(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    k = 0.6 if rider else 1.0
    for x0 in (-0.5, 0.14):  # the wheels: rims of four bars with air between
        s.part(x0, x0 + 0.36, -0.05, 0.05, 0, 0.1 * k, 'tyre')
        s.part(x0, x0 + 0.36, -0.05, 0.05, 0.56 * k, 0.64 * k, 'tyre')
        s.part(x0, x0 + 0.06, -0.05, 0.05, 0.1 * k, 0.56 * k, 'tyre')
        s.part(x0 + 0.3, x0 + 0.36, -0.05, 0.05, 0.1 * k, 0.56 * k, 'tyre')
    s.part(-0.14, 0.14, -0.05, 0.05, 0.28 * k, 0.4 * k, 'body')
    s.part(-0.3, 0.3, -0.05, 0.05, 0.64 * k, 0.74 * k, 'body')
    s.part(-0.24, -0.08, -0.16, 0.16, 0.82 * k, 0.92 * k, 'dark')
    s.part(-0.19, -0.13, -0.05, 0.05, 0.74 * k, 0.82 * k, 'body')
    s.part(0.22, 0.28, -0.05, 0.05, 0.74 * k, 0.94 * k, 'body')
    s.part(0.2, 0.28, -0.5, 0.5, 0.94 * k, k, 'dark')
    if rider:
        _rider(s, -0.26, -0.02, 0.92 * k, width=0.36)
    return s


def _rider(s: Shape, x0: float, x1: float, seat: float, width: float) -> None:
    for y in (-width, width - 0.14):  # legs beside the frame
        s.part(x0 + 0.1, x1 + 0.1, y, y + 0.14, 0.2, seat, 'third')
    s.part(x0, x1, -width, width, seat, 0.86, 'fourth')
    s.part(x1, x1 + 0.2, -width, width, 0.74, 0.8, 'fourth')
    head = s.part(x0 + 0.06, x1, -width * 0.5, width * 0.5, 0.86, 1, 'skin')
    s.patch(head, ('+y', '-y', '-x', '+z'), 0, 1, 0.4, 1, 'dark')


def pedestrian(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    step = rng.uniform(0.0, 0.28)
    s.part(step - 0.16, step + 0.16, 0.04, 0.28, 0, 0.45, 'second')
    s.part(-step - 0.16, -step + 0.16, -0.28, -0.04, 0, 0.45, 'second')
    body = s.part(-0.26, 0.26, -0.36, 0.36, 0.45, 0.82, 'body')
    for y0, y1, swing in ((0.36, 0.5, -step), (-0.5, -0.36, step)):
        s.part(swing / 2 - 0.13, swing / 2 + 0.13, y0, y1, 0.42, 0.8, 'body')
    head = s.part(-0.17, 0.19, -0.17, 0.17, 0.85, 1, 'skin')
    s.part(-0.1, 0.1, -0.1, 0.1, 0.82, 0.85, 'skin')
    s.patch(head, SIDES, 0, 0.6, 0.3, 1, 'dark')  # hair, not on the face
    s.patch(head, ('-x', '+z'), 0, 1, 0, 1, 'dark')
    if rng.random() < 0.4:
        s.part(-0.46, -0.26, -0.26, 0.26, 0.52, 0.8, 'third')
    elif rng.random() < 0.4:
        s.patch(body, AROUND, 0, 1, 0.3, 0.5, 'third')
    return s


def traffic_cone(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    s.part(-0.5, 0.5, -0.5, 0.5, 0, 0.07, rng.choice(['tyre', 'body']))
    widths = np.linspace(0.36, 0.09, 5)
    tops = np.linspace(0.07, 1, 6)
    for k, width in enumerate(widths):
        collar = 'collar' if k in (1, 3) else 'body'
        s.part(-width, width, -width, width, tops[k], tops[k + 1], collar)
    return s


def barrier(rng: np.random.Generator, rider: bool) -> Shape:
    """Draws a barrier across its heading, as nuScenes has it: x is the short side."""
    s = Shape()
    count = int(rng.integers(4, 8))
    if rng.random() < 0.5:  # concrete profile
        s.part(-0.5, 0.5, -0.5, 0.5, 0, 0.3, 'body')
        low = s.part(-0.32, 0.32, -0.5, 0.5, 0.3, 0.55, 'body')
        top = s.part(-0.18, 0.18, -0.5, 0.5, 0.55, 1, 'body')
        s.row(low, ('+x', '-x'), count, 0, 1, 'collar', gap=0.5)
    else:  # planks on two feet
        for y in (-0.42, 0.34):
            s.part(-0.5, 0.5, y, y + 0.08, 0, 0.2, 'dark')
            s.part(-0.1, 0.1, y, y + 0.08, 0.2, 0.55, 'dark')
        top = s.part(-0.16, 0.16, -0.5, 0.5, 0.55, 1, 'body')
    s.row(top, ('+x', '-x'), count, 0, 1, 'collar', gap=0.5)
    return s


def building(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    body = s.part(-0.5, 0.5, -0.5, 0.5, 0, 1, 'body')
    floors, count = int(rng.integers(2, 4)), int(rng.integers(3, 6))
    for k in range(floors):
        v = (k + 0.35) / floors
        s.row(body, AROUND, count, v, v + 0.4 / floors, 'window', gap=0.5)
    return s


def wall(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    body = s.part(-0.5, 0.5, -0.5, 0.5, 0, 1, 'body')
    s.row(body, SIDES, int(rng.integers(3, 8)), 0.05, 0.95, 'second', gap=0.15)
    return s


def pole(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    s.part(-0.12, 0.12, -0.12, 0.12, 0, 0.85, 'rib')
    if rng.random() < 0.5:
        s.part(-0.5, 0.5, -0.5, 0.5, 0.94, 1, 'lamp')
        s.part(-0.1, 0.1, -0.1, 0.1, 0.85, 0.94, 'rib')
    else:
        s.part(-0.1, 0.1, -0.5, 0.5, 0.85, 1, 'plate')
    return s


def tree(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    s.part(-0.1, 0.1, -0.1, 0.1, 0, 0.35, 'dark')
    z = (0.35, 0.6, 0.85, 1)
    for k, width in enumerate(rng.uniform((0.38, 0.4, 0.2), (0.46, 0.5, 0.36))):
        crown = s.part(-width, width, -width, width, z[k], z[k + 1], 'leaf')
        for face in AROUND:
            for u, v in rng.uniform(0, 0.7, (3, 2)):
                s.patch(crown, face, u, u + 0.3, v, v + 0.3, 'second leaf')
    return s


def bush(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    low = s.part(-0.5, 0.5, -0.5, 0.5, 0, 0.6, 'leaf')
    s.part(-0.35, 0.3, -0.3, 0.35, 0.6, 1, 'second leaf')
    for face in AROUND:
        for u, v in rng.uniform(0, 0.6, (3, 2)):
            s.patch(low, face, u, u + 0.4, v, v + 0.4, 'second leaf')
    return s


def debris(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    body = s.part(-0.5, 0.5, -0.5, 0.5, 0, 1, 'body')
    s.patch(body, ('+x', '-x', '+y', '-y', '+z'), 0.1, 0.9, 0.42, 0.58, 'second')
    return s


SHAPES: dict[str, Callable[[np.random.Generator, bool], Shape]] = {
    f.__name__: f
    for f in (car, truck, bus, trailer, construction_vehicle, bicycle, motorcycle, pedestrian)
    + (traffic_cone, barrier, building, wall, pole, tree, bush, debris)
}
