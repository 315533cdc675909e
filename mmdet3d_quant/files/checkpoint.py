"""The one door for checkpoints: tensors and plain values come in, code does not.

``torch.load`` runs what a pickle says. Everything here reads with ``files/unpickler.py``, which
runs nothing. :func:`use_one_door` makes mmengine read that way too, so that ``load_from``,
``init_cfg`` and ``resume`` are as safe as the tools of this package.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch
from mmengine.logging import print_log
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner import find_latest_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from mmdet3d_quant.files.errors import CheckpointError
from mmdet3d_quant.files.kinds import is_safetensors, kind_of, program_in
from mmdet3d_quant.files.sources import Source, resolve
from mmdet3d_quant.files.unpickler import Inert, data_pickle
from mmdet3d_quant.files.weights import with_state_dict

#: Prefixes, as patterns, of the names that mmengine has loaders for.
PREFIXES = (
    'http://', 'https://', 'modelzoo://', 'torchvision://', 'open-mmlab://', 'openmmlab://',
    'mmcls://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://', 'pavi://', '',
)  # yapf: disable  # fmt: skip


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads the weights and notes of a checkpoint.

    The logs and optimizer state that mmengine stores beside the weights are not needed here and
    may hold objects of any class; those become inert placeholders.

    Args:
        path: A file saved by torch or mmengine: a dict with ``state_dict`` or another of
            ``weights.KEYS``, a bare state dict, or a model that was pickled whole; or a
            safetensors file.

    Returns:
        Dict with ``state_dict`` (name to tensor) and ``meta`` (plain values only).

    Raises:
        CheckpointError: If the file is missing, truncated, without weights, or of another kind,
            which is named.
    """
    data = _read_weights(path)
    meta = _plain(data.get('meta'))
    return dict(state_dict=data['state_dict'], meta=meta if isinstance(meta, dict) else {})


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
    data = with_state_dict(data, path)
    if strange:
        raise CheckpointError(
            f'checkpoint {path} holds objects of {", ".join(sorted(strange))}, which may run code '
            'when read: it is not resumed. To start from its weights alone, leave --resume away '
            f"and set load_from='{path}'"
        )
    meta = data.get('meta')
    meta = meta if isinstance(meta, dict) else {}
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
    data = _read_weights(resolve(filename), map_location, name=filename)
    if isinstance(data.get('meta'), dict) and data['meta'].pop('config', None) is not None:
        print_log(f'{filename}: the config text in its meta is not run', logger='current')
    if filename.startswith('mmcls://'):
        data = mmengine_checkpoint._process_mmcls_checkpoint(data)
    return data


def _read_weights(source: Source, map_location: Any = 'cpu', name: Any = None) -> dict[str, Any]:
    """What a file holds, its weights under ``state_dict``; tells what was left out."""
    name = source if name is None else name
    data, strange = _read(source, map_location, name)
    if strange and not isinstance(data, Inert):  # of a whole model another line tells
        print_log(
            f'{name}: objects of {", ".join(sorted(strange))} were not read, since that may run '
            'code; weights and logs were. If the file is yours, save it without them',
            logger='current',
            level=logging.WARNING,
        )
    return with_state_dict(data, name)


def _read(source: Source, map_location: Any = 'cpu', name: Any = None) -> tuple[Any, set[str]]:
    """What a file holds, and the classes of the objects that were not read."""
    name = source if name is None else name
    if not isinstance(source, (str, Path)):
        return _read_open(source, map_location, name)
    if Path(source).is_dir():
        raise CheckpointError(f'checkpoint {name} is a folder: give a file in it')
    if not Path(source).is_file():
        raise CheckpointError(f'checkpoint {name} does not exist')
    with open(source, 'rb') as file:
        return _read_open(file, map_location, name)


def _read_open(file: BinaryIO, map_location: Any, name: Any) -> tuple[Any, set[str]]:
    strange: set[str] = set()
    if is_safetensors(file):
        return dict(state_dict=_read_safetensors(file, name)), strange
    try:
        program = program_in(file)
        if program is None:
            file.seek(0)
            with warnings.catch_warnings():
                warnings.filterwarnings('ignore', 'TypedStorage is deprecated')  # torch's own use
                data = torch.load(
                    file,
                    map_location=map_location,
                    pickle_module=data_pickle(strange),
                    weights_only=False,  # the unpickler given is the stricter one
                )
            return data, strange
    except Exception as err:  # torch raises RuntimeError, EOFError, OSError, KeyError ...
        kind = kind_of(file)
        if kind is not None:
            raise CheckpointError(f'checkpoint {name} is {kind}') from None
        raise CheckpointError(
            f'checkpoint {name} is truncated or damaged: {_reason(err)}; copy or download it again'
        ) from err
    raise CheckpointError(
        f"checkpoint {name} is {program}, which is a program: save {{'state_dict': "
        'model.state_dict()} instead'
    )


def _read_safetensors(file: BinaryIO, name: Any) -> dict[str, torch.Tensor]:
    """Names and tensors of a safetensors file, whose bounds its library checks."""
    try:
        from safetensors.torch import load
    except ImportError:
        raise CheckpointError(
            f'checkpoint {name} is a safetensors file: `pip install safetensors` to read it'
        ) from None
    try:
        return load(file.read())
    except Exception as err:  # its SafetensorError, and whatever a header leads to
        raise CheckpointError(
            f'checkpoint {name} is a safetensors file, truncated or damaged: {_reason(err)}; copy '
            'or download it again'
        ) from None


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
