#!/usr/bin/env python
"""Run the tests with the Pythons and torches that mmdet3d's users have, and tell in a table.

Each row has an environment of its own in .venv-matrix, made once. mmcv's operators are compiled
for the oldest and the newest (10 minutes each on 2 cores); the rows between leave them out, so
that what runs an operator is passed over there.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / '.venv-matrix'
TABLE = ROOT / 'docs/versions.md'
MARK = '<!-- the table of `make test-matrix` -->\n'
EXAMPLE = """
examples:
  python tests/matrix.py                       # all rows, then the table in docs/versions.md
  python tests/matrix.py oldest newest
  python tests/matrix.py newest --tests tests/export tests/layers
"""
BUILD = ('setuptools==69.5.1', 'wheel', 'ninja', 'psutil', 'numpy<2')
SHOWN = ('numpy', 'onnx', 'onnxruntime', 'openvino', 'spconv', 'mmdet3d')
#: Stands for mmcv's compiled module; tests/conftest.py passes over a test that calls it.
STUB = '''
"""mmcv's operators, left out."""

LEFT_OUT = 'mmcv operators are left out in this environment'


def __getattr__(name):
    if name.startswith('__'):
        raise AttributeError(name)

    def operator(*args, **kwargs):
        raise NotImplementedError(LEFT_OUT)

    return operator
'''
#: mmcv 2.1.0 asks for C++17 by name, the headers of torch 2.12 and later want C++20.
COMPILER = '#!/bin/bash\nexec g++ "${@/#-std=c++1[47]/-std=c++20}"\n'


@dataclass(frozen=True)
class Row:
    """One environment: its Python, its torch, and whether mmcv's operators are compiled."""

    python: str
    torch: str
    torchvision: str
    operators: bool = False
    cxx20: bool = False


ROWS = {
    'oldest': Row('3.8', '2.0.1', '0.15.2', operators=True),
    'python39': Row('3.9', '2.2.2', '0.17.2'),
    'jetpack6': Row('3.10', '2.4.1', '0.19.1'),
    'newest': Row('3.12', '2.14.1', '0.29.1', operators=True, cxx20=True),
}


def requirements() -> dict[str, list[str]]:
    """Reads what setup.py says that the package needs, without running it.

    Returns:
        Dict of lists of requirements by name of the extra; ``''`` is the package itself.
    """
    nodes = ast.walk(ast.parse((ROOT / 'setup.py').read_text()))
    given = {word.arg: word.value for n in nodes if isinstance(n, ast.Call) for word in n.keywords}
    extras = ast.literal_eval(given['extras_require'])
    return {'': ast.literal_eval(given['install_requires']), **extras}


#: What the package and its tests need beside torch and mmcv.
NEEDS = (*requirements()[''], *requirements()['export'], 'spconv', 'pytest>=8', 'hypothesis')


def interpreter(version: str) -> str:
    """A Python of that version, on the PATH or in pyenv.

    Raises:
        SystemExit: If there is none.
    """
    for path in sorted(Path.home().glob(f'.pyenv/versions/{version}.*/bin/python'), reverse=True):
        return str(path)
    found = shutil.which(f'python{version}')
    if found is None:
        sys.exit(f'error: there is no Python {version}: install it, or `pyenv install {version}`')
    return found


def build(name: str, row: Row) -> Path:
    """Makes the environment of a row, if it is not there; returns its Python."""
    folder = HOME / name
    python = folder / 'bin/python'
    ready = folder / 'ready'
    wanted = '\n'.join([repr(row), *NEEDS, STUB])
    if ready.is_file() and ready.read_text() == wanted:
        return python
    print(f'== {name}: environment in {folder}', flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([interpreter(row.python), '-m', 'venv', str(folder)], check=True)
    pip = [str(python), '-m', 'pip', '--disable-pip-version-check', 'install', '-q']
    torch = [f'torch=={row.torch}', f'torchvision=={row.torchvision}']
    print(f'== {name}: torch {row.torch}', flush=True)
    subprocess.run([*pip, *BUILD, *torch], check=True)
    env = dict(os.environ, MMCV_WITH_OPS='1')
    if row.cxx20:
        compiler = folder / 'c++20'
        compiler.write_text(COMPILER)
        compiler.chmod(0o755)
        env['CXX'] = str(compiler)
    print(f'== {name}: mmcv, operators {"compiled: minutes" if row.operators else "left out"}')
    mmcv = ['--no-build-isolation', 'mmcv==2.1.0'] if row.operators else ['mmcv-lite==2.1.0']
    subprocess.run([*pip, *mmcv], check=True, env=env)
    if not row.operators:
        where = [str(python), '-c', 'import mmcv; print(mmcv.__path__[0])']
        home = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
        Path(home, '_ext.py').write_text(STUB)
    print(f'== {name}: mmdet3d and the rest', flush=True)
    subprocess.run([*pip, *NEEDS, *torch], check=True)
    ready.write_text(wanted)
    return python


@dataclass
class Result:
    """What the tests of one environment gave."""

    row: str
    versions: dict[str, str]
    passed: int
    failed: list[str]
    skipped: Counter


def test(name: str, python: Path, tests: list[str]) -> Result:
    """Runs the tests in an environment."""
    print(f'== {name}: tests', flush=True)
    report = HOME / f'{name}.xml'
    report.unlink(missing_ok=True)
    words = ['-m', 'pytest', '-p', 'no:cacheprovider', '--continue-on-collection-errors']
    words += [f'--junitxml={report}', '--ignore=tests/test_matrix.py', *tests]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    subprocess.run([str(python), *words], cwd=ROOT, env=env)
    if not report.is_file():
        sys.exit(f'error: {name}: the tests did not run; see above')
    code = f'import importlib.metadata as m; print(*(m.version(n) for n in {SHOWN!r}))'
    shown = subprocess.run([str(python), '-c', code], capture_output=True, text=True, check=True)
    return Result(name, dict(zip(SHOWN, shown.stdout.split())), *read(report))


def read(report: Path) -> tuple[int, list[str], Counter]:
    """How many tests passed, those that failed, and how many were passed over for which reason."""
    passed, failed, skipped = 0, [], Counter()
    for case in ElementTree.parse(report).iter('testcase'):
        at = f'{case.get("classname")}::{case.get("name")}'
        kinds = {child.tag: child for child in case}
        if 'failure' in kinds or 'error' in kinds:
            failed.append(at)
        elif 'skipped' in kinds:
            skipped[kinds['skipped'].get('message', 'no reason').partition('\n')[0]] += 1
        else:
            passed += 1
    return passed, failed, skipped


def table(results: list[Result]) -> str:
    """The results as Markdown."""
    lines = [
        '| Python | torch | mmcv operators | ' + ' | '.join(SHOWN) + ' | passed | passed over |'
    ]
    lines.append('|---' * (5 + len(SHOWN)) + '|')
    notes: list[str] = []
    for result in results:
        row = ROWS[result.row]
        numbers = []
        for reason, count in result.skipped.most_common():
            if reason not in notes:
                notes.append(reason)
            numbers.append(f'{count} ({notes.index(reason) + 1})')
        cells = [row.python, row.torch, 'compiled' if row.operators else 'left out']
        cells += [result.versions[name] for name in SHOWN]
        cells += [str(result.passed), ', '.join(numbers) or '0']
        lines.append('| ' + ' | '.join(cells) + ' |')
    lines += ['', *(f'{i}. {note}' for i, note in enumerate(notes, 1))]
    return '\n'.join(lines) + '\n'


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ', '.join(ROWS)
    parser.add_argument('rows', nargs='*', metavar='ROW', help=f'of {names}; default: all')
    parser.add_argument('--tests', nargs='+', default=[], help='only these; the table stays')
    args = parser.parse_args(argv)
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        parser.error(f'there is no row {unknown[0]}; there are {names}')
    results = []
    for name in args.rows or ROWS:
        results.append(test(name, build(name, ROWS[name]), args.tests))
    print(table(results))
    failed = [f'{result.row}: {at}' for result in results for at in result.failed]
    for line in failed:
        print(f'failed: {line}')
    if not failed and not args.tests and len(results) == len(ROWS):
        before = TABLE.read_text().partition(MARK)[0]
        TABLE.write_text(before + MARK + table(results))
        print(f'Wrote {TABLE}')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
