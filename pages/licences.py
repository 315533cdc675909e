"""Write docs/licences.md: the licence of every package of the lock files, by its own metadata.

``python -m pages.licences`` in the environment of the lock, that is ``make pages``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs/licences.md'
LOCKS = ('requirements/lock.txt', 'requirements/compiler.txt')
#: What makes a licence worth reading before something is shipped with the package.
STRICT = re.compile(r'general public|\bGPL|proprietary|non-?commercial', re.I)
HEAD = """# Licences of the dependencies

mmdet3d-quant is Apache-2.0. Here is every package of `requirements/lock.txt` and
`requirements/compiler.txt`, with what its own metadata says of its licence, in its words. None of
them is part of the wheel; pip installs them beside it. `make pages` writes this page.
"""


def name_of(text: str) -> str:
    """Reads the name of a requirement, in the one spelling that compares."""
    found = re.match(r'[\w.-]+', text)
    assert found, text
    return re.sub(r'[-_.]+', '-', found[0]).lower()


def locked() -> dict[str, str]:
    """Reads the lock files.

    Returns:
        Dict of versions by name, as the files spell it.
    """
    lines = [line for lock in LOCKS for line in (ROOT / lock).read_text().splitlines()]
    pairs = [line.split('==') for line in lines if '==' in line and not line.startswith('#')]
    return {name.strip(): version.strip() for name, version in pairs}


def licence(metadata: Any) -> str:
    """Reads a licence as the metadata of a package tells it.

    Args:
        metadata: Of the package, as email or importlib read it.

    Returns:
        Its expression, or else classifiers and the field that is free text.

    Raises:
        ValueError: If it tells none.
    """
    if metadata['License-Expression']:
        return metadata['License-Expression']
    given = metadata.get_all('Classifier') or []
    told = [text.rpartition(' :: ')[2] for text in given if text.startswith('License ::')]
    free = (metadata['License'] or '').strip()
    if free and free != 'UNKNOWN' and '\n' not in free:
        told.append(free.rpartition(' :: ')[2])
    if not told:
        raise ValueError(f'{metadata["Name"]} tells no licence: read its source, and say it here')
    return ' / '.join(dict.fromkeys(told))


def needed_by(names: Mapping[str, str]) -> dict[str, list[str]]:
    """Finds which packages of the lock ask for each, extras left out.

    Args:
        names: The spelling of the lock by the one that compares.

    Returns:
        Dict of names, as the lock spells them.
    """
    found: dict[str, list[str]] = {name: [] for name in names}
    for name, shown in names.items():
        for text in distribution(name).requires or []:
            other = name_of(text)
            if 'extra ==' not in text and other in found and shown not in found[other]:
                found[other].append(shown)
    return {name: sorted(asking) for name, asking in found.items()}


def wanted() -> dict[str, str]:
    """Reads from setup.py who of us asks for a package: the package itself, or an extra."""
    from tests.matrix import requirements

    found: dict[str, str] = {}
    for extra, texts in requirements().items():
        for text in texts:
            found.setdefault(name_of(text), f'extra `{extra}`' if extra else '**mmdet3d-quant**')
    return found


def page() -> str:
    """Writes the page.

    Returns:
        Markdown.

    Raises:
        ValueError: If the environment is not that of the lock files, or a licence is not told.
    """
    versions = locked()
    for name, version in versions.items():
        try:
            here = distribution(name).version
        except PackageNotFoundError:
            here = 'nothing'
        if here != version:
            raise ValueError(f'{name}: the lock has {version}, this environment {here}: make setup')
    spelled = {name_of(name): name for name in versions}
    asking, ours = needed_by(spelled), wanted()
    rows, strict = [], []
    for name, shown in sorted(spelled.items()):
        told = licence(distribution(shown).metadata)
        who = [ours[name]] if name in ours else asking[name]
        row = f'| {shown} | {versions[shown]} | {told} | {", ".join(who[:4]) or "the lock"} |'
        rows.append(row)
        if STRICT.search(told):
            strict.append(row)
    table = '| package | version | licence | asked for by |\n|---|---|---|---|\n'
    return (
        f'{HEAD}\n## Read these before you ship\n\nThey are not free for every use:\n\n{table}'
        + '\n'.join(strict)
        + f'\n\n## All\n\n{table}'
        + '\n'.join(rows)
        + '\n'
    )


if __name__ == '__main__':
    try:
        PAGE.write_text(page())
    except ValueError as err:
        sys.exit(f'error: {err}')
