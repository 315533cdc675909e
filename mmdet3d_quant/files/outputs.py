"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path; on success it becomes ``path``, on failure it vanishes.

    Args:
        path: Where the file shall appear. Missing parent folders are created. A link stays one:
            what it points to is written.

    Raises:
        OSError: If the folder cannot be written to, or a folder, pipe or device is there, or the
            disk is full; says so with the path.
    """
    check_writable(path)
    path = Path(path).resolve()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except RuntimeError as err:  # torch.save says so when a disk is full
        if 'inline_container' not in str(err):
            raise
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(
            f'cannot write {path}: the disk took only a part ({free:.0f} MiB are free now)'
        ) from err
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
    try:
        place = Path(path).resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            raise IsADirectoryError('is a folder')
        if place.exists() and not place.is_file():
            raise OSError('is a device or a pipe, which a file would replace; name a file')
        with tempfile.TemporaryFile(dir=place.parent):
            pass
    except (OSError, RuntimeError) as err:  # Python 3.8 to 3.12 call a loop of links RuntimeError
        raise OSError(f'cannot write {path}: {err}') from None


def sha256(path: str | Path) -> str:
    """Computes the SHA-256 of a file, as hex digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
