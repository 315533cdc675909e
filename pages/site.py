"""Hooks of MkDocs: pages that lie outside of docs/, the API reference, and no line to the outside.

MkDocs calls the functions by their names; ``mkdocs.yml`` names this file.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from pages import notebooks

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'mmdet3d_quant'
#: Files of the checkout that are pages of the site, by their place there.
OUTSIDE = {
    'overview.md': 'README.md',
    'contributing.md': 'CONTRIBUTING.md',
    'changelog.md': 'CHANGELOG.md',
    'weights.md': 'checkpoints/README.md',
}
LINK = re.compile(r'(?<=\]\()(?!https?:|#)([^)#\s]+)')
#: What a browser would fetch by itself.
FETCHED = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="?(https?:)?//[^>]*>')
#: A role of Sphinx, which docstrings have before a name in backticks; where one begins with it,
#: the first colon has gone as that behind a type.
ROLE = re.compile(r'(?::|\b)(?:meth|func|class|data|mod|attr):\s?(?=<code>)(<code>)~?')
REFERENCE = """# API

Every module, from its docstrings. What most need: [calibration](calibration.md),
[export](export.md), [qat](qat.md), [engines](engines.md), [check](check.md), and the
[jobs](jobs.md) that the tools do.

| room | |
|---|---|
"""


def on_config(config: Any) -> Any:
    """Adds the pages of the reference to the navigation."""
    (api,) = (part for part in config.nav if 'API' in part)
    api['API'] += [{room: f'reference/{room}.md'} for room in rooms()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are no files of docs/."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=_with_links(ROOT / source)))
    for path in notebooks.NOTEBOOKS:
        text = LINK.sub(
            lambda m: _page_of(m[1]), notebooks.as_markdown(notebooks.read(path), path.name)
        )
        files.append(File.generated(config, f'notebooks/{path.stem}.md', content=text))
    for page, text in reference().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Has links to files that lie outside of docs/ lead to their pages."""
    path = Path(page.file.abs_src_path or '')
    if page.file.generated_by or not path.is_file():
        return markdown
    return LINK.sub(lambda m: _moved(m[1], path), markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Takes the roles of Sphinx from docstrings; the names behind them stay."""
    return ROLE.sub(r'\1', html)


def on_post_build(config: Any) -> None:
    """Makes sure that reading the site fetches nothing from elsewhere.

    Raises:
        PluginError: If a page would.
    """
    for path in Path(config.site_dir).rglob('*.html'):
        found = FETCHED.search(path.read_text())
        if found and 'rel="canonical"' not in found[0]:
            raise PluginError(f'{path} fetches something: {found[0]}')


def _with_links(path: Path) -> str:
    """The text of a document, its links as they are on the site."""
    return LINK.sub(lambda m: _moved(m[1], path), path.read_text())


def _moved(link: str, source: Path) -> str:
    """A link as it is on the site, which is flat but for the reference."""
    target = (source.parent / link).resolve()
    pages = {(ROOT / file).resolve(): page for page, file in OUTSIDE.items()}
    if target in pages:
        return pages[target]
    inside = (ROOT / 'docs').resolve()
    return _page_of(str(target.relative_to(inside)) if inside in target.parents else link)


def _page_of(link: str) -> str:
    """A link; that to a notebook leads to its page."""
    return re.sub(r'\.ipynb$', '.md', link)


def rooms() -> dict[str, list[Path]]:
    """Lists the rooms of the package that have docstrings to show, with their files."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob('*.py')):
        room = path.relative_to(PACKAGE).parts[0]
        if (PACKAGE / room).is_dir() and '.mim' not in path.parts:
            found.setdefault(room, []).append(path)
    return found


def reference() -> dict[str, str]:
    """Writes the pages of the reference: one for each room, every module in it."""
    table, pages = REFERENCE, {}
    for room, files in rooms().items():
        about = ast.get_docstring(ast.parse((PACKAGE / room / '__init__.py').read_text())) or ''
        table += f'| [{room}]({room}.md) | {" ".join(about.partition(chr(10) * 2)[0].split())} |\n'
        modules = [path.relative_to(ROOT).with_suffix('').as_posix() for path in files]
        names = [module.replace('/', '.').replace('.__init__', '') for module in modules]
        shown = ''.join(f'::: {name}\n\n' for name in names)
        pages[f'reference/{room}.md'] = f'# {room}\n\n{shown}'
    return {'reference/index.md': table, **pages}
