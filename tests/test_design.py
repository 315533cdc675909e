"""docs/design.md is true of the tree: what it names is there, and no file is too long."""

import ast
import re

import pytest

from tests.small import ROOT

PACKAGE = ROOT / 'mmdet3d_quant'
DOCS = sorted((ROOT / 'docs').glob('*.md')) + [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md']
#: A path in backticks: a file in a folder, or a folder with a slash at its end.
NAMED = re.compile(r'`((?:[a-z_-]+/)+[a-z_0-9-]*(?:\.py)?)`')
#: Lines of a file of the package, and of a tool, beyond which it says why.
LONGEST, LONGEST_TOOL = 300, 200


def exists(name):
    return any((base / name).exists() for base in (ROOT, PACKAGE))


@pytest.mark.parametrize('path', DOCS, ids=lambda p: p.name)
def test_files_that_are_named_are_there(path):
    gone = [m[1] for m in NAMED.finditer(path.read_text()) if not exists(m[1])]
    assert gone == []


@pytest.mark.parametrize('folder, limit', [(PACKAGE, LONGEST), (ROOT / 'tools', LONGEST_TOOL)])
def test_no_file_is_too_long(folder, limit):
    lengths = {p: len(p.read_text().splitlines()) for p in folder.rglob('*.py')}
    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > limit} == {}


def files_page():
    """docs/files.md: every module with the first sentence of its docstring."""
    lines = ['# Files', '', 'The first sentence of every module (`make files` writes this page).']
    room = None
    for path in sorted(PACKAGE.rglob('*.py')):
        name = path.relative_to(PACKAGE).as_posix()
        if name.partition('/')[0] != room:
            room = name.partition('/')[0]
            lines += ['', f'## {room}', '', '| file | |', '|---|---|']
        text = ast.get_docstring(ast.parse(path.read_text())) or ''
        first = ' '.join(text.partition('\n\n')[0].split())
        first = re.split(r'(?<=\.)\s', first)[0]
        lines.append(f'| `{name}` | {first} |')
    return '\n'.join(lines) + '\n'


def test_every_file_has_its_sentence():
    assert (ROOT / 'docs/files.md').read_text() == files_page(), 'run `make files`'


if __name__ == '__main__':
    (ROOT / 'docs/files.md').write_text(files_page())
