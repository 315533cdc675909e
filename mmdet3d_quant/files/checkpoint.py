"""The one door for checkpoints: tensors and plain values come in, code does not.

``torch.load`` runs what a pickle says. Everything here reads with :class:`_DataUnpickler`, which
knows tensors, arrays, plain containers and mmengine's log buffers, and stands a placeholder in
for any other class without importing it. :func:`use_one_door` makes mmengine read that way too,
so that ``load_from``, ``init_cfg`` and ``resume`` are as safe as the tools of this package.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, Union

import numpy as np
import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.fileio import get_file_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner import find_latest_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals

from mmdet3d_quant.core.errors import QuantError

Source = Union[str, Path, BinaryIO]

#: Where mmengine's loaders find what a name stands for: pattern of the prefix and the way to a
#: local file. What has no way is refused.
PREFIXES = (
    'http://', 'https://', 'modelzoo://', 'torchvision://', 'open-mmlab://', 'openmmlab://',
    'mmcls://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://', 'pavi://', '',
)  # yapf: disable  # fmt: skip


class CheckpointError(QuantError, ValueError):
    """A checkpoint is missing, damaged, unsafe to read or of another architecture."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads the weights and notes of a checkpoint.

    The logs and optimizer state that mmengine stores beside the weights are not needed here and
    may hold objects of any class; those become inert placeholders.

    Args:
        path: A file saved by torch or mmengine: a dict with ``state_dict`` (or a bare state
            dict).

    Returns:
        Dict with ``state_dict`` (name to tensor) and ``meta`` (plain values only).

    Raises:
        CheckpointError: If the file is missing, truncated, no checkpoint, or a pickled object.
    """
    data, strange = _read(path)
    state = _weights(data, path)
    _tell(strange, path)
    meta = _plain(data.get('meta')) if 'state_dict' in data else None
    return dict(state_dict=state, meta=meta if isinstance(meta, dict) else {})


def read_training(path: str | Path) -> dict[str, Any]:
    """Reads all that a training needs to go on as if it had never stopped.

    Args:
        path: A checkpoint that mmengine's Runner saved.

    Returns:
        ``state_dict``, ``meta``, ``optimizer``, ``message_hub`` and whatever else was saved.

    Raises:
        CheckpointError: As :func:`read_checkpoint`; also if the file holds an object of a class
            that a training does not need, or lacks what one needs.
    """
    data, strange = _read(path)
    _weights(data, path)
    if strange:
        raise CheckpointError(
            f'checkpoint {path} holds objects of {", ".join(sorted(strange))}, which may run code '
            'when read: it is not resumed. To start from its weights alone, leave --resume away '
            f"and set load_from='{path}'"
        )
    missing = [key for key in ('meta', 'message_hub', 'optimizer') if key not in data]
    missing += [f'meta.{key}' for key in ('epoch', 'iter') if key not in data.get('meta', {})]
    if missing:
        raise CheckpointError(
            f'checkpoint {path} has no {missing[0]}: a training cannot go on from it. To start '
            f"from its weights, leave --resume away and set load_from='{path}'"
        )
    return data


def latest(work_dir: str | Path) -> str | None:
    """The checkpoint that ``--resume`` without a file goes on from, or None.

    Raises:
        CheckpointError: If ``last_checkpoint`` of the folder names a file that is not there.
    """
    path = find_latest_checkpoint(str(work_dir))
    if path is not None and not os.path.isfile(path):
        raise CheckpointError(
            f'{Path(work_dir) / "last_checkpoint"} names {path}, which does not exist: give the '
            'checkpoint, as in --resume epoch_3.pth'
        )
    return path


def use_one_door() -> None:
    """Makes mmengine read checkpoints of every scheme as :func:`read_checkpoint` does.

    Replaces the loaders of mmengine's ``CheckpointLoader`` for the rest of the process. Safe to
    call again.
    """
    CheckpointLoader.register_scheme(PREFIXES, load_from_one_door, force=True)


def load_from_one_door(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A loader for mmengine's ``CheckpointLoader``.

    Args:
        filename: A path, a URL, or a name such as ``torchvision://resnet50``.
        map_location: As for ``torch.load``.

    Returns:
        What the file holds, with log buffers of mmengine rebuilt. Objects of other classes are
        placeholders, which is told. ``meta.config``, which mmengine would run as a config when
        it resumes, is left out.

    Raises:
        CheckpointError: As :func:`read_checkpoint`, or if the name cannot be resolved.
    """
    source = _resolve(filename)
    data, strange = _read(source, map_location, name=filename)
    _weights(data, filename)
    _tell(strange, filename)
    if isinstance(data.get('meta'), dict) and data['meta'].pop('config', None) is not None:
        print_log(f'{filename}: the config text in its meta is not run', logger='current')
    if filename.startswith('mmcls://'):
        data = mmengine_checkpoint._process_mmcls_checkpoint(data)
    return data


def _resolve(name: str) -> Source:
    """Path of a local file, or a buffer, for a name that mmengine understands."""
    scheme, found, rest = str(name).partition('://')
    if not found:
        return os.path.expanduser(name)
    if scheme == 'pavi':
        raise CheckpointError(f'{name}: download the file and give its path')
    if scheme.endswith(('s3', 'petrel')):
        backend = get_file_backend(name, backend_args=dict(backend='petrel'))
        return io.BytesIO(backend.get(name))
    tables: dict[str, Callable[[], Any]] = {
        'modelzoo': mmengine_checkpoint.get_torchvision_models,
        'torchvision': mmengine_checkpoint.get_torchvision_models,
        'open-mmlab': mmengine_checkpoint.get_external_models,
        'openmmlab': mmengine_checkpoint.get_external_models,
        'mmcls': mmengine_checkpoint.get_mmcls_models,
    }
    if scheme not in tables:
        return _download(name)
    known = tables[scheme]()
    rest = mmengine_checkpoint.get_deprecated_model_names().get(rest, rest)
    if rest not in known:
        raise CheckpointError(f'{name}: {scheme} has no such model')
    target = known[rest]
    if '://' in target:
        return _download(target)
    return os.path.join(mmengine_checkpoint._get_mmengine_home(), target)


def _download(url: str) -> str:
    """Local copy of a URL in torch's cache; the first process of several fetches it."""
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    path = folder / os.path.basename(url.partition('?')[0])
    if get_dist_info()[0] == 0 and not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except (OSError, ValueError) as err:
            raise CheckpointError(f'{url} cannot be fetched: {err}') from None
    barrier()
    return str(path)


def _read(source: Source, map_location: Any = 'cpu', name: Any = None) -> tuple[Any, set[str]]:
    """What a file holds, and the classes of the objects that were not read."""
    if name is None:
        name = source
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise CheckpointError(f'checkpoint {name} does not exist')
    strange: set[str] = set()
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                if any(entry.endswith('/constants.pkl') for entry in archive.namelist()):
                    raise _TorchScriptError
        if not isinstance(source, (str, Path)):
            source.seek(0)
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'TypedStorage is deprecated')  # torch's own use
            data = torch.load(
                source,
                map_location=map_location,
                pickle_module=_data_pickle(strange),
                weights_only=False,  # the unpickler given is the stricter one
            )
    except _TorchScriptError:
        raise CheckpointError(
            f'checkpoint {name} is a TorchScript archive, which is a program: save '
            "{'state_dict': model.state_dict()} instead"
        ) from None
    except Exception as err:  # torch raises RuntimeError, EOFError, OSError, KeyError ...
        raise CheckpointError(f'checkpoint {name} is truncated or damaged: {_reason(err)}') from err
    return data, strange


def _tell(strange: set[str], name: Any) -> None:
    """Warns of what was left out, which neither weights nor the logs of a training need."""
    if strange:
        print_log(
            f'{name}: objects of {", ".join(sorted(strange))} were not read, since that may run '
            'code; weights and logs were. If the file is yours, save it without them',
            logger='current',
            level=logging.WARNING,
        )


class _TorchScriptError(Exception):
    pass


def _weights(data: Any, path: Any) -> dict[str, Tensor]:
    """The state dict of what a file holds.

    Raises:
        CheckpointError: If there is none, or it holds anything but tensors.
    """
    state = None
    if isinstance(data, dict):
        state = next((data[key] for key in ('state_dict', 'model') if key in data), data)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(
            f'checkpoint {path} has no state_dict; whole pickled models are refused, since '
            "loading them runs their code: save {'state_dict': model.state_dict()} instead"
        )
    odd = [k for k, v in state.items() if not isinstance(v, Tensor)]
    if odd:
        raise CheckpointError(
            f'checkpoint {path}: {odd[0]!r} in the state_dict is no tensor: save '
            "{'state_dict': model.state_dict()} again"
        )
    return state


class _Inert:
    """Stands for an object of a class that is not read, whatever is done to it."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Pickle fills lists so."""

    def extend(self, values: Any) -> None:
        """And so."""

    def add(self, value: Any) -> None:
        """And sets so."""


def _array_globals() -> dict[str, Any]:
    """What NumPy's arrays, scalars and types are pickled as, in NumPy 1 and 2."""
    rebuild, scalar = np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    found: dict[str, Any] = {'numpy.ndarray': np.ndarray, 'numpy.dtype': np.dtype}
    for core in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        found[f'{core}._reconstruct'] = rebuild
        found[f'{core}.scalar'] = scalar
    for kind in {type(np.dtype(code)) for code in '?bBhHiIlLqQefdFDSU'}:
        found[f'{kind.__module__}.{kind.__name__}'] = kind
    return found


class _Buffer(HistoryBuffer):
    """A log buffer of mmengine while it is read; its state makes it one.

    Its methods are saved along, by name; those are the class's own, and stay so.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set_default_statistics()
        self.__dict__.update({k: v for k, v in state.items() if k != 'statistics_methods'})
        self.__class__ = HistoryBuffer  # type: ignore[assignment]


class _Call:
    """A function or class that a pickle may call, and do nothing else to.

    A pickle can also set attributes of what it names, and so change a class for the process.
    """

    __slots__ = ('_target',)

    def __init__(self, target: Callable[..., Any]) -> None:
        self._target = target

    def __call__(self, *args: Any) -> Any:
        return self._target(*_unwrapped(args))

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f'sets attributes of {self._target}')


def _unwrapped(value: Any) -> Any:
    if isinstance(value, _Call):
        return value._target
    return tuple(map(_unwrapped, value)) if type(value) is tuple else value


#: Beside torch's own: arrays and harmless containers.
_KNOWN: dict[str, Any] = {
    **_array_globals(),
    '_codecs.encode': codecs.encode,  # how protocol 2 spells bytes
    **{
        f'{module}.{kind.__name__}': kind
        for module in ('builtins', '__builtin__')
        for kind in (set, frozenset, slice, complex, bytearray, range)
    },
}
_KNOWN['__builtin__.xrange'] = range
_BUFFER = 'mmengine.logging.history_buffer.HistoryBuffer'
_GETATTR = ('builtins.getattr', '__builtin__.getattr')


class _DataUnpickler(pickle.Unpickler):
    """Rebuilds tensors, arrays and plain containers; everything else becomes :class:`_Inert`."""

    strange: set[str]

    def find_class(self, module: str, name: str) -> Any:
        key = f'{module}.{name}'
        if key == _BUFFER:
            return _Buffer
        if key in _GETATTR or key.startswith(f'{_BUFFER}.'):
            return _Call(self._attribute)
        known = _get_allowed_globals().get(key, _KNOWN.get(key))
        if known is None:
            self.strange.add(key)
            return _Inert
        return _Call(known) if callable(known) else known

    def _attribute(self, owner: Any = _Buffer, name: str = '') -> Any:
        """Stands for ``getattr``: the methods of a log buffer are not needed, others not read."""
        if owner is not _Buffer:
            self.strange.add(f'getattr(..., {name!r})')
        return _Inert()


def _data_pickle(strange: set[str]) -> Any:
    """A module as ``torch.load`` wants one; ``strange`` gets the names that were not read."""
    kind = type('_Unpickler', (_DataUnpickler,), dict(strange=strange))
    return SimpleNamespace(
        __name__='data_pickle',
        Unpickler=kind,
        load=lambda file, **kwargs: kind(file, **kwargs).load(),
    )


def load_plain(path: str | Path) -> Any:
    """Unpickles a file of plain values and arrays, such as an info file of mmdet3d.

    Raises:
        CheckpointError: If it holds an object of any other class.
        Exception: Whatever pickle raises for a damaged file.
    """
    strange: set[str] = set()
    with open(path, 'rb') as file:
        data = _data_pickle(strange).load(file)
    if strange:
        raise CheckpointError(
            f'{path} holds objects of {", ".join(sorted(strange))}, which may run code when read'
        )
    return data


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
