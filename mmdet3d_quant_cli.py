"""The console command ``mmdet3d-quant``: the scripts of ``tools/``, from any folder.

A module of its own, since importing the package takes seconds and each tool does so itself.
"""

from __future__ import annotations

import ast
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

#: Folders whose files may be named from anywhere, as in ``configs/bevfusion_tiny/...``.
CARRIED = ('configs', 'checkpoints')
USAGE = """usage: mmdet3d-quant TOOL [ARGUMENTS ...]

{tools}

`mmdet3d-quant TOOL --help` shows a tool's options with examples. Paths that begin with configs/
or checkpoints/ and are not in the current folder are looked for in
  {home}"""


def home() -> Path:
    """The folder with ``tools`` and ``configs``: in an installed wheel, or of the checkout."""
    package = _package()
    carried = package / '.mim'
    return carried if carried.is_dir() else package.parent


def _package() -> Path:
    spec = find_spec('mmdet3d_quant')
    assert spec and spec.submodule_search_locations, 'the package is installed with this module'
    return Path(spec.submodule_search_locations[0])


def tools() -> dict[str, Path]:
    """The scripts by name; what they share with each other is no script."""
    scripts = sorted((home() / 'tools').glob('*.py'))
    return {path.stem: path for path in scripts if path.read_text().startswith('#!')}


def located(argument: str) -> str:
    """An argument; if it names a carried file that is not in the current folder, its full path."""
    folder = argument.partition('/')[0]
    carried = home() / argument
    if folder in CARRIED and not os.path.exists(argument) and carried.exists():
        return str(carried)
    return argument


def main(argv: list[str] | None = None) -> None:
    """Runs a tool in the place of this process."""
    words = sys.argv[1:] if argv is None else argv
    known = tools()
    if not words or words[0] in ('-h', '--help'):
        width = max(map(len, known), default=0)
        lines = [f'  {name:{width}}  {_summary(path)}' for name, path in known.items()]
        print(USAGE.format(tools='\n'.join(lines), home=home()))
        return
    if words[0] == '--version':
        print(runpy.run_path(str(_package() / 'version.py'))['__version__'])
        return
    script = known.get(words[0].replace('-', '_'))
    if script is None:
        sys.exit(
            f'error: there is no tool {words[0]!r} in {home() / "tools"}; there are '
            f'{", ".join(known)}'
        )
    os.execv(sys.executable, [sys.executable, str(script), *map(located, words[1:])])


def _summary(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or '').partition('\n')[0]
