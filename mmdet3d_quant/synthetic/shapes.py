"""What each kind of object looks like: cuboid parts and patches painted on their faces.

Shapes are written in fractions of an object's size: x from -0.5 (back) to 0.5 (front), y from
-0.5 (right) to 0.5 (left), z from 0 (ground) to 1 (top). Parts touch but do not overlap, so that
both sensors can sort them. A part is ``(x0, x1, y0, y1, z0, z1, material)``, a patch
``(part, face, u0, u1, v0, v1, material)`` with u and v from 0 to 1 along the face's two axes in
the order x, y, z. Materials are names only; ``paint.py`` gives them a colour.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Sequence

import numpy as np

FACES = ('+x', '-x', '+y', '-y', '+z', '-z')


@dataclass
class Shape:
    """Parts and patches in fractions of the object's size."""

    parts: list[tuple] = field(default_factory=list)
    patches: list[tuple] = field(default_factory=list)

    def part(self, x0, x1, y0, y1, z0, z1, material: str) -> int:
        """Adds a cuboid; returns its index, which patches refer to."""
        self.parts.append((x0, x1, y0, y1, z0, z1, material))
        return len(self.parts) - 1

    def patch(self, part: int, faces: str | Sequence[str], u0, u1, v0, v1, material: str) -> None:
        """Paints a rectangle on one or several faces of a part."""
        for face in [faces] if isinstance(faces, str) else faces:
            self.patches.append((part, face, u0, u1, v0, v1, material))

    def row(self, part: int, faces, count: int, v0, v1, material: str, gap=0.25, u0=0.0, u1=1.0):
        """Paints ``count`` rectangles side by side, such as the windows of a bus."""
        step = (u1 - u0) / count
        for k in range(count):
            start = u0 + (k + gap / 2) * step
            self.patch(part, faces, start, start + (1 - gap) * step, v0, v1, material)

    def wheels(self, at: Sequence[float], length: float, top: float, width=0.16) -> None:
        """Adds a pair of wheels at each x."""
        for x in at:
            for y0, y1 in ((-0.5, -0.5 + width), (0.5 - width, 0.5)):
                self.part(x - length / 2, x + length / 2, y0, y1, 0, top, 'tyre')

    def lamps(self, part: int, v0: float, v1: float, width=0.18) -> None:
        """Paints head lamps and tail lamps at the edges of a part's front and back."""
        for u0, u1 in ((0.04, 0.04 + width), (0.96 - width, 0.96)):
            self.patch(part, '+x', u0, u1, v0, v1, 'head lamp')
            self.patch(part, '-x', u0, u1, v0, v1, 'tail lamp')


def car(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    kind = rng.choice(3)  # saloon, estate or van, pick-up
    waist = rng.uniform(0.5, 0.6)
    back, front = [(-0.34, 0.2), (-0.47, 0.24), (-0.05, 0.24)][kind]
    body = s.part(-0.49, 0.5, -0.5, 0.5, 0.2, waist, 'body')
    s.part(-0.5, -0.49, -0.14, 0.14, 0.3, 0.38, 'plate')
    cabin = s.part(back, front, -0.43, 0.43, waist, 1, rng.choice(['body', 'second']))
    s.wheels((-0.31, 0.32), 0.15, 0.2)
    for x in (0.18, 0.82):  # the wheel arches
        s.patch(body, ('+y', '-y'), x - 0.08, x + 0.08, 0, 0.55, 'tyre')
    s.patch(cabin, '+x', 0.06, 0.94, 0.1, 0.88, 'glass')
    s.patch(cabin, '-x', 0.12, 0.88, 0.3, 0.85, 'glass')
    s.row(cabin, ('+y', '-y'), 2 + (kind == 1), 0.15, 0.82, 'glass', gap=0.14)
    s.patch(body, '+x', 0.28, 0.72, 0.2, 0.7, 'dark')
    s.patch(body, ('+y', '-y'), 0.48, 0.49, 0.1, 0.95, 'dark')
    s.lamps(body, 0.5, 0.85)
    if kind == 2:  # the open bed
        s.patch(body, '+z', 0.03, 0.42, 0.1, 0.9, 'dark')
    return s


def truck(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    nose = rng.uniform(0.2, 0.3)
    load_top = rng.choice([1.0, rng.uniform(0.55, 0.75)])
    cab_top = rng.uniform(0.7, 0.85) if load_top == 1 else 1.0
    cab = s.part(nose, 0.5, -0.47, 0.47, 0.16, cab_top, 'body')
    s.part(-0.45, 0.48, -0.22, 0.22, 0.13, 0.16, 'dark')
    load = s.part(-0.49, nose - 0.05, -0.5, 0.5, 0.28, load_top, 'second')
    s.part(-0.49, nose - 0.05, -0.25, 0.25, 0.16, 0.28, 'dark')
    s.part(-0.5, -0.49, -0.3, 0.3, 0.3, 0.35, 'plate')
    s.wheels((0.36,), 0.13, 0.13)
    s.wheels((-0.38, -0.22), 0.13, 0.27, width=0.2)
    s.patch(cab, '+x', 0.07, 0.93, 0.5, 0.9, 'glass')
    s.patch(cab, '+x', 0.2, 0.8, 0.12, 0.38, 'dark')
    s.patch(cab, ('+y', '-y'), 0.35, 0.9, 0.52, 0.88, 'glass')
    s.patch(cab, ('+y', '-y'), 0.2, 0.85, 0, 0.22, 'tyre')
    for u0, u1 in ((0.03, 0.2), (0.8, 0.97)):
        s.patch(cab, '+x', u0, u1, 0.1, 0.25, 'head lamp')
        s.patch(load, '-x', u0, u1, 0.02, 0.08, 'tail lamp')
    s.patch(load, '-x', 0.485, 0.515, 0.05, 0.97, 'dark')  # the two doors
    if rng.random() < 0.6:
        s.patch(load, ('+y', '-y'), 0.15, 0.85, rng.uniform(0.3, 0.5), 0.8, 'third')
    return s


def bus(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    body = s.part(-0.49, 0.5, -0.5, 0.5, 0.1, 0.93, 'body')
    s.part(-0.5, -0.49, -0.1, 0.1, 0.2, 0.25, 'plate')
    start = rng.uniform(-0.4, -0.1)
    s.part(start, start + rng.uniform(0.2, 0.35), -0.32, 0.32, 0.93, 1, 'second')
    s.wheels((-0.28, 0.3), 0.09, 0.1)
    for x in (0.22, 0.8):
        s.patch(body, ('+y', '-y'), x - 0.045, x + 0.045, 0, 0.2, 'tyre')
    count = int(rng.integers(5, 9))
    s.row(body, ('+y', '-y'), count, 0.48, 0.86, 'window', gap=0.16, u0=0.03, u1=0.97)
    s.patch(body, '-y', 0.88, 0.96, 0.04, 0.86, 'window')  # doors, on the right
    s.patch(body, '-y', 0.48, 0.56, 0.04, 0.86, 'window')
    s.patch(body, '+x', 0.05, 0.95, 0.3, 0.82, 'glass')
    s.patch(body, '+x', 0.2, 0.8, 0.86, 0.95, 'sign')
    s.patch(body, '-x', 0.15, 0.85, 0.6, 0.85, 'glass')
    s.patch(body, ('+y', '-y'), 0.0, 1.0, 0.3, 0.38, 'third')
    s.lamps(body, 0.08, 0.17)
    return s


def trailer(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    floor = rng.uniform(0.28, 0.36)
    body = s.part(-0.49, 0.5, -0.5, 0.5, floor, 1, 'body')
    s.part(-0.5, -0.49, -0.3, 0.3, floor + 0.01, floor + 0.05, 'plate')
    s.part(-0.45, 0.45, -0.15, 0.15, floor - 0.07, floor, 'dark')
    s.wheels((-0.4, -0.3, -0.2), 0.085, floor - 0.07, width=0.2)
    for y in (-0.3, 0.24):  # the legs it stands on
        s.part(0.24, 0.27, y, y + 0.06, 0, floor - 0.07, 'dark')
    count = int(rng.integers(8, 14))
    s.row(body, ('+y', '-y'), count, 0.04, 0.96, 'rib', gap=0.75)  # ribs, no windows
    s.row(body, '+x', 4, 0.04, 0.96, 'rib', gap=0.75)
    s.patch(body, '-x', 0.49, 0.51, 0.03, 0.97, 'dark')
    for u in (0.3, 0.7):  # bars of the doors
        s.patch(body, '-x', u - 0.01, u + 0.01, 0.03, 0.97, 'rib')
    for u0, u1 in ((0.03, 0.15), (0.85, 0.97)):
        s.patch(body, '-x', u0, u1, 0.01, 0.06, 'tail lamp')
    return s


def construction_vehicle(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    if rng.random() < 0.6:  # excavator: tracks, turret, boom down to a bucket
        for y0, y1 in ((-0.5, -0.25), (0.25, 0.5)):
            track = s.part(-0.4, 0.2, y0, y1, 0, 0.24, 'tyre')
            s.row(track, ('+y', '-y'), 5, 0.2, 0.8, 'rib', gap=0.4)
        s.part(-0.3, 0.1, -0.25, 0.25, 0.08, 0.24, 'dark')
        turret = s.part(-0.5, 0.14, -0.45, 0.45, 0.24, 0.52, 'body')
        s.row(turret, ('-x', '-y'), 4, 0.2, 0.8, 'rib', gap=0.5)
        cab = s.part(-0.1, 0.14, 0.05, 0.42, 0.52, 0.9, 'second')
        boom_y = (-0.12, 0.02)
        s.part(0.14, 0.24, *boom_y, 0.4, 0.72, 'body')
        s.part(0.2, 0.34, *boom_y, 0.72, 1, 'body')
        s.part(0.34, 0.43, *boom_y, 0.62, 0.95, 'body')
        s.part(0.43, 0.5, *boom_y, 0.22, 0.75, 'body')
        s.part(0.36, 0.5, -0.25, 0.15, 0, 0.22, 'dark')
    else:  # wheel loader: big wheels, arms, a bucket over the whole width
        s.wheels((-0.33, 0.12), 0.24, 0.42, width=0.22)
        body = s.part(-0.5, 0.0, -0.28, 0.28, 0.16, 0.58, 'body')
        s.part(0.0, 0.24, -0.28, 0.28, 0.16, 0.46, 'body')
        s.row(body, '-x', 4, 0.2, 0.8, 'rib', gap=0.5)
        cab = s.part(-0.2, 0.06, -0.26, 0.26, 0.58, 1, 'second')
        for y in (-0.22, 0.14):
            s.part(0.24, 0.36, y, y + 0.08, 0.2, 0.46, 'body')
        bucket = s.part(0.36, 0.5, -0.5, 0.5, 0.02, 0.34, 'dark')
        s.row(bucket, '+x', 6, 0, 0.2, 'rib', gap=0.5)
    s.patch(cab, ('+x', '+y', '-y'), 0.1, 0.9, 0.2, 0.9, 'glass')
    s.patch(cab, '-x', 0.15, 0.85, 0.4, 0.85, 'glass')
    s.part(*_on(s.parts[cab]), 'beacon')
    s.parts = [(*p[:5], p[5] * 0.96, p[6]) if p[6] != 'beacon' else p for p in s.parts]
    return s


def _on(part: tuple) -> tuple:
    """A small box on top of a cab."""
    x, y, top = (part[0] + part[1]) / 2, (part[2] + part[3]) / 2, part[5] * 0.96
    return x - 0.02, x + 0.02, y - 0.04, y + 0.04, top, min(1.0, top + 0.04)


def motorcycle(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    k = 0.66 if rider else 1.0  # with a rider the box is taller
    s.part(-0.5, -0.22, -0.12, 0.12, 0, 0.5 * k, 'tyre')
    s.part(0.24, 0.5, -0.12, 0.12, 0, 0.5 * k, 'tyre')
    body = s.part(-0.22, 0.24, -0.3, 0.3, 0.14 * k, 0.6 * k, 'dark')
    s.patch(body, ('+y', '-y'), 0.1, 0.6, 0.1, 0.5, 'rib')  # the engine
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
    s.patch(head, ('+y', '-y'), 0, 0.6, 0.3, 1, 'dark')  # hair, not on the face
    s.patch(head, ('-x', '+z'), 0, 1, 0, 1, 'dark')
    if rng.random() < 0.4:
        s.part(-0.46, -0.26, -0.26, 0.26, 0.52, 0.8, 'third')
    elif rng.random() < 0.4:
        s.patch(body, ('+x', '-x', '+y', '-y'), 0, 1, 0.3, 0.5, 'third')
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
    """Lies across its heading, as nuScenes has it: x is the short side."""
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
        s.row(body, ('+x', '-x', '+y', '-y'), count, v, v + 0.4 / floors, 'window', gap=0.5)
    return s


def wall(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    body = s.part(-0.5, 0.5, -0.5, 0.5, 0, 1, 'body')
    s.row(body, ('+y', '-y'), int(rng.integers(3, 8)), 0.05, 0.95, 'second', gap=0.15)
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
        for face in FACES[:4]:
            for u, v in rng.uniform(0, 0.7, (3, 2)):
                s.patch(crown, face, u, u + 0.3, v, v + 0.3, 'second leaf')
    return s


def bush(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    low = s.part(-0.5, 0.5, -0.5, 0.5, 0, 0.6, 'leaf')
    s.part(-0.35, 0.3, -0.3, 0.35, 0.6, 1, 'second leaf')
    for face in FACES[:4]:
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
