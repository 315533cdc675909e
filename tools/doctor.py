#!/usr/bin/env python
"""Say what this environment has, what will be fast and what will be wrong in it, with remedies.

For newcomers and for bug reports. Works where packages are missing or broken.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = """
examples:
  python tools/doctor.py
  mmdet3d-quant doctor --json > doctor.json

exit code: 0, or 1 if a line says wrong
"""
WIDTH = 100


def stand_in() -> None:
    """Makes the package's rooms importable without its face, which imports torch."""
    rooms = [str(ROOT / 'mmdet3d_quant')]
    spec = None if Path(rooms[0]).is_dir() else find_spec('mmdet3d_quant')  # of a wheel
    package = ModuleType('mmdet3d_quant')
    package.__path__ = list(spec.submodule_search_locations or []) if spec else rooms
    sys.modules.setdefault('mmdet3d_quant', package)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--json', action='store_true', help='lines and facts, for programs')
    return parser.parse_args(argv)


def show(lines: list) -> None:
    """Prints lines under their headings, what follows and remedies below them."""
    group = ''
    for line in lines:
        if line.group != group:
            group = line.group
            print(f'\n{group}')
        print(f'  {line.status:5}  {line.name:22} {line.found}')
        for text, mark in ((line.says, ''), (line.remedy, 'do: ')):
            if text:
                block = textwrap.fill(
                    mark + text, WIDTH, initial_indent=' ' * 9, subsequent_indent=' ' * 9,
                    break_long_words=False, break_on_hyphens=False,
                )  # fmt: skip
                print(block)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    stand_in()
    from mmdet3d_quant.doctor import SLOW, WRONG, gather, judge

    facts = gather()
    lines = judge(facts)
    wrong, slow = ([line for line in lines if line.status == s] for s in (WRONG, SLOW))
    if args.json:
        print(json.dumps(dict(lines=[asdict(line) for line in lines], facts=facts), indent=2))
    else:
        show(lines)
        print(f'\n{len(wrong)} wrong, {len(slow)} slow, {len(lines)} looked at')
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
