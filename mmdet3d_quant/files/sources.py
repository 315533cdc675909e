"""From a name that mmengine understands to a file: paths, URLs, and names of model zoos."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Union

import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.fileio import get_file_backend
from mmengine.runner import checkpoint as mmengine_checkpoint

from mmdet3d_quant.files.errors import CheckpointError

Source = Union[str, Path, BinaryIO]


def resolve(name: str) -> Source:
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
