"""Shapes of vehicles with four wheels or more, in the notation of ``parts.py``."""

from __future__ import annotations

import numpy as np

from mmdet3d_quant.synthetic.parts import SIDES, Shape


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
        s.patch(body, SIDES, x - 0.08, x + 0.08, 0, 0.55, 'tyre')
    s.patch(cabin, '+x', 0.06, 0.94, 0.1, 0.88, 'glass')
    s.patch(cabin, '-x', 0.12, 0.88, 0.3, 0.85, 'glass')
    s.row(cabin, SIDES, 2 + (kind == 1), 0.15, 0.82, 'glass', gap=0.14)
    s.patch(body, '+x', 0.28, 0.72, 0.2, 0.7, 'dark')
    s.patch(body, SIDES, 0.48, 0.49, 0.1, 0.95, 'dark')
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
    s.patch(cab, SIDES, 0.35, 0.9, 0.52, 0.88, 'glass')
    s.patch(cab, SIDES, 0.2, 0.85, 0, 0.22, 'tyre')
    for u0, u1 in ((0.03, 0.2), (0.8, 0.97)):
        s.patch(cab, '+x', u0, u1, 0.1, 0.25, 'head lamp')
        s.patch(load, '-x', u0, u1, 0.02, 0.08, 'tail lamp')
    s.patch(load, '-x', 0.485, 0.515, 0.05, 0.97, 'dark')  # the two doors
    if rng.random() < 0.6:
        s.patch(load, SIDES, 0.15, 0.85, rng.uniform(0.3, 0.5), 0.8, 'third')
    return s


def bus(rng: np.random.Generator, rider: bool) -> Shape:
    s = Shape()
    body = s.part(-0.49, 0.5, -0.5, 0.5, 0.1, 0.93, 'body')
    s.part(-0.5, -0.49, -0.1, 0.1, 0.2, 0.25, 'plate')
    start = rng.uniform(-0.4, -0.1)
    s.part(start, start + rng.uniform(0.2, 0.35), -0.32, 0.32, 0.93, 1, 'second')
    s.wheels((-0.28, 0.3), 0.09, 0.1)
    for x in (0.22, 0.8):
        s.patch(body, SIDES, x - 0.045, x + 0.045, 0, 0.2, 'tyre')
    count = int(rng.integers(5, 9))
    s.row(body, SIDES, count, 0.48, 0.86, 'window', gap=0.16, u0=0.03, u1=0.97)
    s.patch(body, '-y', 0.88, 0.96, 0.04, 0.86, 'window')  # doors, on the right
    s.patch(body, '-y', 0.48, 0.56, 0.04, 0.86, 'window')
    s.patch(body, '+x', 0.05, 0.95, 0.3, 0.82, 'glass')
    s.patch(body, '+x', 0.2, 0.8, 0.86, 0.95, 'sign')
    s.patch(body, '-x', 0.15, 0.85, 0.6, 0.85, 'glass')
    s.patch(body, SIDES, 0.0, 1.0, 0.3, 0.38, 'third')
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
    s.row(body, SIDES, count, 0.04, 0.96, 'rib', gap=0.75)  # ribs, no windows
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
            s.row(track, SIDES, 5, 0.2, 0.8, 'rib', gap=0.4)
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
    x0, x1, y0, y1, z0, z1 = _on(s.parts[cab])
    s.part(x0, x1, y0, y1, z0, z1, 'beacon')
    s.parts = [(*p[:5], p[5] * 0.96, p[6]) if p[6] != 'beacon' else p for p in s.parts]
    return s


def _on(part: tuple) -> tuple:
    """Places a small box on top of a cab."""
    x, y, top = (part[0] + part[1]) / 2, (part[2] + part[3]) / 2, part[5] * 0.96
    return x - 0.02, x + 0.02, y - 0.04, y + 0.04, top, min(1.0, top + 0.04)
