"""Reuse of files and folders that were made earlier from the same inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def once(path: Path, key: dict[str, Any], make: Callable[[], Any]) -> bool:
    """Makes a file or folder, unless it is there, made with the same key and unchanged.

    Args:
        path: File or folder that ``make`` writes.
        key: All that decides its content, as plain values; kept beside it.
        make: Writes it.

    Returns:
        bool, True if it was made, False if the one there was reused.
    """
    stamp = path.with_name(f'{path.name}.key')
    if stamp.is_file() and _files(path) and stamp.read_text() == _stamp(path, key):
        return False
    stamp.unlink(missing_ok=True)  # from here on the old key may be no longer true
    path.parent.mkdir(parents=True, exist_ok=True)
    make()
    stamp.write_text(_stamp(path, key))
    return True


def _stamp(path: Path, key: dict[str, Any]) -> str:
    return json.dumps(dict(key=key, files=_files(path)), indent=1, sort_keys=True)


def _files(path: Path) -> dict[str, list[int]]:
    """Reads size and time of change of a file, or of all files in a folder."""
    files = sorted(path.rglob('*')) if path.is_dir() else [path]
    stats = {str(file.relative_to(path)): file.stat() for file in files if file.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def digest(paths: Iterable[Path]) -> str:
    """Hashes the text of all Python files under some paths into one SHA-256."""
    result = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob('*.py')) if path.is_dir() else [path]:
            result.update(file.name.encode() + b'\0' + file.read_bytes() + b'\0')
    return result.hexdigest()
