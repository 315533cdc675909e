"""Draw docs/floors.svg: the rooms of the package by floor, and which rooms each one imports.

Floors are those that tests/test_floors.py holds the code to, imports are read off the code.
``python -m pages.floors``, that is ``make pages``.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, PICTURE = ROOT / 'mmdet3d_quant', ROOT / 'docs/floors.svg'
#: Pixels: of a room, between rooms, of a floor.
WIDTH, GAP, HEIGHT, LEFT = 178, 8, 108, 44
STYLE = """<style>
text { font: 12px sans-serif; fill: #1a1a1a }
.room { font-weight: bold; font-size: 14px }
rect { fill: #eef2fb; stroke: #3f51b5 }
</style>"""


def imported(path: Path) -> Iterator[str]:
    """Lists the rooms that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split('.')
            if package == PACKAGE.name and rest:
                yield rest[0]


def uses() -> dict[str, set[str]]:
    """Finds which rooms each room imports.

    Returns:
        Dict of sets by room, itself left out.
    """
    found: dict[str, set[str]] = {}
    rooms = {path.name for path in PACKAGE.iterdir() if (path / '__init__.py').is_file()}
    for room in rooms:
        files = [path for path in (PACKAGE / room).rglob('*.py') if '.mim' not in path.parts]
        seen = {name for path in files for name in imported(path)}
        found[room] = (seen & rooms) - {room}
    return found


def picture(floors: dict[str, int], used: dict[str, set[str]]) -> str:
    """Draws the house.

    Args:
        floors: Floor by room, of those that are folders.
        used: Rooms that each room imports.

    Returns:
        SVG, the ground floor at the bottom.
    """
    top = max(floors.values())
    by_floor = [[r for r in floors if floors[r] == n] for n in range(top, -1, -1)]
    widest = max(map(len, by_floor))
    width, height = LEFT + widest * (WIDTH + GAP), (top + 1) * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="Rooms by floor">',
        STYLE,
        f'<rect width="{width}" height="{height}" style="fill: #ffffff; stroke: none"/>',
    ]
    for line, rooms in enumerate(by_floor):
        y = line * HEIGHT
        parts.append(f'<text x="8" y="{y + HEIGHT // 2}" class="room">F{top - line}</text>')
        for place, room in enumerate(rooms):
            x = LEFT + place * (WIDTH + GAP)
            parts.append(
                f'<rect x="{x}" y="{y + 4}" width="{WIDTH}" height="{HEIGHT - GAP}" rx="5"/>'
            )
            parts.append(f'<text x="{x + 8}" y="{y + 22}" class="room">{escape(room)}</text>')
            told = ', '.join(sorted(used[room], key=lambda r: (-floors[r], r))) or 'nothing'
            for n, text in enumerate(textwrap.wrap(f'imports {told}', 27)):
                parts.append(f'<text x="{x + 8}" y="{y + 40 + 14 * n}">{escape(text)}</text>')
    return '\n'.join([*parts, '</svg>']) + '\n'


def house() -> str:
    """Draws the house as floors and code are now; see :func:`picture`."""
    from tests.test_floors import FLOORS

    used = uses()
    return picture({room: floor for room, floor in FLOORS.items() if room in used}, used)


if __name__ == '__main__':
    PICTURE.write_text(house())
