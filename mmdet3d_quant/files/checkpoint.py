"""The one door for checkpoints: tensors and plain values come in, code does not.

``torch.load`` runs what a pickle says. Everything here reads with ``files/unpickler.py``, which
runs nothing. :func:`use_one_door` makes mmengine read that way too, so that ``load_from``,
``init_cfg`` and ``resume`` are as safe as the tools of this package.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Union

import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.fileio import get_file_backend
from mmengine.logging import print_log
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner import find_latest_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.files.plain import nonfinite_entries
from mmdet3d_quant.files.unpickler import data_pickle

Source = Union[str, Path, BinaryIO]

#: Prefixes, as patterns, of the names that mmengine has loaders for.
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
    meta = data.get('meta') if isinstance(data.get('meta'), dict) else {}
    missing = [key for key in ('meta', 'message_hub', 'optimizer') if key not in data]
    missing += [f'meta.{key}' for key in ('epoch', 'iter') if key not in meta]
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
                pickle_module=data_pickle(strange),
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
        CheckpointError: If there is none, or it holds anything but tensors, NaN or infinity.
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
    bad = nonfinite_entries(state)
    if bad:
        raise CheckpointError(
            f'checkpoint {path}: {bad[0]} holds NaN or infinity ({len(bad)} such entries): '
            'take one from before the training diverged'
        )
    return state


def load_plain(path: str | Path) -> Any:
    """Unpickles a file of plain values and arrays, such as an info file of mmdet3d.

    Raises:
        CheckpointError: If it holds an object of any other class.
        Exception: Whatever pickle raises for a damaged file.
    """
    strange: set[str] = set()
    with open(path, 'rb') as file:
        data = data_pickle(strange).load(file)
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
