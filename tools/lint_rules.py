#!/usr/bin/env python
"""Write the page of the linter's rules: what each engine does about each, and where it was seen."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from terminal import run_tool

from mmdet3d_quant.check.lint.page import page
from mmdet3d_quant.files.outputs import check_writable, whole

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = """
examples:
  python tools/lint_rules.py | less
  python tools/lint_rules.py --out docs/lint.md
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, help='write it here; default: to the console')
    parser.add_argument(
        '--agreement',
        type=Path,
        default=ROOT / 'docs/lint_agreement.json',
        help='result of benchmarks/lint_agreement.py; default where it exists: %(default)s',
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.out is not None:
        check_writable(args.out)
    agreement = json.loads(args.agreement.read_text()) if args.agreement.is_file() else None
    text = page(agreement)
    if args.out is None:
        print(text, end='')
        return
    with whole(args.out) as part:
        Path(part).write_text(text)


if __name__ == '__main__':
    run_tool(main)
