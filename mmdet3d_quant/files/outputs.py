"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path; on success it becomes ``path``, on failure it vanishes.

    Args:
        path: Where the file shall appear. Missing parent folders are created.

    Raises:
        OSError: If the folder cannot be written to; says so with the path.
    """
    path = Path(path)
    check_writable(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder; on success its files move into ``path``, else they vanish.

    Args:
        path: Folder to fill; other files in it stay.

    Raises:
        OSError: If the folder cannot be written to.
    """
    path = Path(path)
    check_writable(path / 'manifest.json')
    with tempfile.TemporaryDirectory(dir=path, prefix='.part-') as name:
        yield Path(name)
        for file in sorted(Path(name).iterdir()):
            os.replace(file, path / file.name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(path: str | Path) -> None:
    """Checks, before long work, that a file can be written at ``path``.

    Raises:
        OSError: If it cannot.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError('is a folder')
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as err:
        raise OSError(f'cannot write {path}: {err}') from None


def sha256(path: str | Path) -> str:
    """Computes the SHA-256 of a file, as hex digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
