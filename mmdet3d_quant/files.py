"""Files: outputs that appear whole or not at all, checkpoints that run no code when read."""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator

import torch
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, unsafe to read or of another architecture."""


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
    """Makes sure, before long work, that a file can be written at ``path``.

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


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint without running code from it.

    The logs and optimizer state that mmengine stores beside the weights may hold objects of any
    class; those are replaced by inert placeholders, their classes never imported.

    Args:
        path: A file saved by torch or mmengine: a dict with ``state_dict`` (or a bare state
            dict).

    Returns:
        Dict with ``state_dict`` (name to tensor) and ``meta`` (plain values only).

    Raises:
        CheckpointError: If the file is missing, truncated, no checkpoint, or a pickled object.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'checkpoint {path} does not exist')
    try:
        data = _load(path)
    except Exception as err:  # torch raises RuntimeError, EOFError, OSError, KeyError ...
        raise CheckpointError(f'checkpoint {path} is truncated or damaged: {_reason(err)}') from err
    state = data.get('state_dict', data) if isinstance(data, dict) else None
    if not isinstance(state, dict) or not state:
        raise CheckpointError(
            f'checkpoint {path} has no state_dict; whole pickled models are refused, since '
            "loading them runs their code: save {'state_dict': model.state_dict()} instead"
        )
    odd = [k for k, v in state.items() if not isinstance(v, Tensor)]
    if odd:
        raise CheckpointError(f'checkpoint {path}: {odd[0]!r} in the state_dict is no tensor')
    meta = _plain(data.get('meta')) if 'state_dict' in data else None
    return dict(state_dict=state, meta=meta if isinstance(meta, dict) else {})


def _load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'TypedStorage is deprecated')  # torch's own use of it
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError:
            return torch.load(path, map_location='cpu', pickle_module=_inert_pickle)


class _Inert:
    """Stands for an object of a class that is not read."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _InertUnpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers; everything else becomes :class:`_Inert`."""

    def find_class(self, module: str, name: str) -> Any:
        return _get_allowed_globals().get(f'{module}.{name}', _Inert)


_inert_pickle = SimpleNamespace(
    __name__='inert_pickle',
    Unpickler=_InertUnpickler,
    load=lambda file, **kw: _InertUnpickler(file, **kw).load(),
)


def _plain(value: Any) -> Any:
    """The strings, numbers, lists and dicts of a value; None for the rest."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if isinstance(k, (str, int))}
    return None


def _reason(err: BaseException) -> str:
    return f'{type(err).__name__}: {str(err).splitlines()[0] if str(err) else "no details"}'


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
