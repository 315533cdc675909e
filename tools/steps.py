"""Steps of a long run: told and timed, and not done twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console


class Steps:
    """Announces steps and times them.

    Args:
        console: Where to tell.
        total: Number of steps.

    Attributes:
        seconds: By title, of every step that reused nothing.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self.seconds: dict[str, float] = {}
        self._number = 0
        self._reused = False

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Rules off a step and says how long it took."""
        self._number += 1
        self._reused = False
        self.console.rule(f'{self._number}/{self.total} {title}')
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        if not self._reused:
            self.seconds[title] = took
        self.console.print(f'[dim]{took:.0f} s[/dim]')

    def once(self, path: Path, key: dict[str, Any], make: Callable[[], Any]) -> None:
        """Makes a file or folder, unless it is there, made from the same things and unchanged.

        Args:
            path: What ``make`` writes.
            key: All that decides its content, as plain values; kept beside it.
            make: Writes it.
        """
        stamp = path.with_name(f'{path.name}.key')
        if stamp.is_file() and _files(path) and stamp.read_text() == _stamp(path, key):
            self.console.print(f'Reusing {path}')
            self._reused = True
            return
        stamp.unlink(missing_ok=True)  # from here on the old key may be no longer true
        path.parent.mkdir(parents=True, exist_ok=True)
        make()
        stamp.write_text(_stamp(path, key))


def _stamp(path: Path, key: dict[str, Any]) -> str:
    return json.dumps(dict(key=key, files=_files(path)), indent=1, sort_keys=True)


def _files(path: Path) -> dict[str, list[int]]:
    """Size and time of change of a file, or of all in a folder."""
    files = sorted(path.rglob('*')) if path.is_dir() else [path]
    stats = {str(file.relative_to(path)): file.stat() for file in files if file.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def digest(paths: Iterable[Path]) -> str:
    """One SHA-256 of the text of all Python files under some paths."""
    result = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob('*.py')) if path.is_dir() else [path]:
            result.update(file.name.encode() + b'\0' + file.read_bytes() + b'\0')
    return result.hexdigest()
