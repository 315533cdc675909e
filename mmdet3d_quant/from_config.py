"""A model, its weights and its data, from a config and a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmdet3d_quant.files import CheckpointError, read_checkpoint
from mmdet3d_quant.modes import quantizers, require_calibrated
from mmdet3d_quant.parents.sparse_layout import accept_any_layout

#: Where calibration data come from: the first of these that the config has.
CALIBRATION_LOADERS = ('calib_dataloader', 'val_dataloader', 'test_dataloader')


class ConfigError(ValueError):
    """A config is missing, cannot be read or lacks what is needed."""


def read_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Reads a config and applies ``--cfg-options``.

    Raises:
        ConfigError: If it is missing, cannot be read, or has no ``model``.
    """
    if not Path(path).is_file():
        raise ConfigError(f'config {path} does not exist')
    try:
        cfg = Config.fromfile(str(path))
    except Exception as err:  # any error of the code in the config
        raise ConfigError(f'config {path} cannot be read: {type(err).__name__}: {err}') from err
    cfg.merge_from_dict(overrides or {})
    if 'model' not in cfg:
        raise ConfigError(f'config {path} has no `model`')
    return cfg


def build_model(cfg: Config) -> nn.Module:
    """Builds ``cfg.model`` in eval mode.

    Raises:
        ConfigError: If a type or an argument of the model is wrong; carries mmengine's message.
    """
    init_default_scope(cfg.get('default_scope', 'mmdet3d'))
    try:
        model = MODELS.build(copy.deepcopy(cfg.model))  # some detectors change theirs
    except (KeyError, TypeError, ValueError, AssertionError) as err:
        raise ConfigError(f'the model of {cfg.filename} cannot be built: {err}') from err
    model.eval()  # not chained: some models return None
    return model


def load_weights(model: nn.Module, path: str | Path, calibrated: bool) -> dict[str, Any]:
    """Loads a checkpoint that must fit the model.

    Args:
        model: The model; its quantizers are loaded too where the checkpoint has them.
        path: The checkpoint.
        calibrated: Whether every quantizer must have a range afterwards.

    Returns:
        The checkpoint's ``meta``.

    Raises:
        CheckpointError: If the file cannot be read, or a weight is missing, left over or of
            another shape. Sparse weights may have the layout of spconv 1 (mmcv) or 2.
        UncalibratedError: If ``calibrated`` and a quantizer has no range.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint['state_dict']
    accept_any_layout(model)  # a LiDAR encoder of the public project does not by itself
    try:
        keys = model.load_state_dict(state, strict=False)
    except RuntimeError as err:
        lines = [line.strip() for line in str(err).splitlines()[1:]]
        raise CheckpointError(
            f'checkpoint {path} is of another architecture: {len(lines)} entries do not fit, '
            f'for example {lines[0] if lines else err}'
        ) from None
    ranges = {f'{name}._amax' for name in quantizers(model)}
    missing = [k for k in keys.missing_keys if k not in ranges]
    for what, names in (('lacks', missing), ('has unknown', keys.unexpected_keys)):
        if names:
            raise CheckpointError(
                f'checkpoint {path} is of another architecture: it {what} {len(names)} '
                f'entries, for example {", ".join(names[:3])}'
            )
    if calibrated:
        require_calibrated(model)
    return checkpoint['meta']


def build_calibration_loader(cfg: Config) -> tuple[str, Any]:
    """The data to calibrate on, in a fixed order.

    Returns:
        Name of the config's entry, and the data loader.

    Raises:
        ConfigError: If the config has none of :data:`CALIBRATION_LOADERS`, or building it fails.
    """
    name = next((n for n in CALIBRATION_LOADERS if cfg.get(n) is not None), None)
    if name is None:
        raise ConfigError(f'{cfg.filename} has none of {", ".join(CALIBRATION_LOADERS)}')
    init_default_scope(cfg.get('default_scope', 'mmdet3d'))
    empty = f'`{name}` of {cfg.filename} is empty: there is nothing to calibrate on'
    try:
        loader = Runner.build_dataloader(cfg[name], seed=0)
    except Exception as err:  # whatever the data set raises
        if 'need at least one array' in str(err):  # mmengine on an info file without frames
            raise ConfigError(empty) from err
        raise ConfigError(
            f'`{name}` of {cfg.filename} cannot be built: {type(err).__name__}: {err}'
        ) from err
    if len(loader) == 0:
        raise ConfigError(empty)
    return name, loader


def batch_indices(loader: Any) -> list[list[int]]:
    """Indices into the data set, batch by batch, in the order of a loader.

    Raises:
        ConfigError: If the loader has no such order.
    """
    if getattr(loader, 'batch_sampler', None) is None:
        raise ConfigError('calibration needs a data set with indices, not an iterable one')
    return [list(indices) for indices in loader.batch_sampler]


def numbered_batches(
    loader: Any, indices: Mapping[int, Sequence[int]]
) -> Iterator[tuple[int, Any]]:
    """Loads some batches only.

    Args:
        loader: Where the data set and the way to load it come from.
        indices: Indices into the data set by number of the batch.

    Yields:
        Number and batch.
    """
    part = DataLoader(
        loader.dataset,
        batch_sampler=list(indices.values()),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        pin_memory=loader.pin_memory,
    )
    yield from zip(indices, part, strict=True)


def evaluated_on(cfg: Config, name: str) -> list[str]:
    """Entries of the config that evaluate on the data of another entry.

    Args:
        cfg: The config.
        name: For example ``calib_dataloader``.

    Returns:
        Those of ``val_dataloader`` and ``test_dataloader`` with the same annotation file.
    """
    source = _source(cfg[name])
    entries = ('val_dataloader', 'test_dataloader')
    return [n for n in entries if n == name or (cfg.get(n) and _source(cfg[n]) == source)]


def _source(loader: Any) -> tuple[str, ...]:
    dataset = loader['dataset']
    while 'dataset' in dataset:  # inside a wrapper
        dataset = dataset['dataset']
    return tuple(str(dataset.get(key)) for key in ('data_root', 'ann_file'))


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or a GPU where there is one.

    Raises:
        ConfigError: If a GPU is asked for and there is none.
    """
    device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ConfigError('device cuda was asked for, but torch sees no GPU')
    return device
