"""Notation of shapes: cuboid parts, and patches painted on their faces.

Everything is in fractions of an object's size: x from -0.5 (back) to 0.5 (front), y from -0.5
(right) to 0.5 (left), z from 0 (ground) to 1 (top). Parts touch but do not overlap, so that the
cameras can paint them in order. A part is ``(x0, x1, y0, y1, z0, z1, material)``, a patch ``(part,
face, u0, u1, v0, v1, material)`` with u and v from 0 to 1 along the face's two axes in the order
x, y, z. Materials are names only; ``solid.py`` gives them a colour.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Sequence

FACES = ('+x', '-x', '+y', '-y', '+z', '-z')
SIDES = ('+y', '-y')
AROUND = FACES[:4]


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
