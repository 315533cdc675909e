"""Building of a model, its weights and its data from a config and a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import mmdet3d
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.naming import dotted, type_name
from mmdet3d_quant.data.nuscenes import DatasetError, check, check_objects, read_infos
from mmdet3d_quant.files.checkpoint import use_one_door
from mmdet3d_quant.runs.weights import load_weights as load_weights

#: Configs in the wheel of mmdet3d, which mmengine finds by ``mmdet3d::``.
WHEEL = Path(mmdet3d.__file__).parent / '.mim' / 'configs'
#: Where calibration data come from: the first of these that the config has.
CALIBRATION_LOADERS = ('calib_dataloader', 'val_dataloader', 'test_dataloader')
#: Tables of more bytes are not read through at every start: v1.0-trainval takes a minute.
_SMALL = 300e6
#: What constructors raise, some in passing, for arguments that they cannot use.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class ConfigError(QuantError, ValueError):
    """A config is missing, cannot be read or lacks what is needed."""


def read_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Reads a config and applies ``--cfg-options``.

    Args:
        path: A file, or ``mmdet3d::...`` for one in the wheel of mmdet3d.
        overrides: What replaces values of the config, by dotted keys.

    Raises:
        ConfigError: If it is missing, cannot be read, or has no ``model``.
    """
    path = located(path)
    if not path.is_file():
        raise ConfigError(
            f'config {path} does not exist; one of mmdet3d is named mmdet3d::FOLDER/FILE'
        )
    try:
        cfg = Config.fromfile(str(path))
    except Exception as err:  # any error of the code in the config
        raise ConfigError(f'config {path} cannot be read: {type(err).__name__}: {err}') from err
    cfg = _without_classes(cfg)
    if overrides:
        cfg.merge_from_dict(overrides)
        cfg = _without_classes(cfg)
    if 'model' not in cfg:
        raise ConfigError(f'config {path} has no `model`')
    return cfg


def located(path: str | Path) -> Path:
    """Finds a config's file: by its path, or one in the wheel of mmdet3d by ``mmdet3d::...``."""
    package, there, name = str(path).partition('::')
    return WHEEL / name if there and package == 'mmdet3d' else Path(path)


def _without_classes(cfg: Config) -> Config:
    """Replaces classes in a config by their names, so that it can be compared and dumped.

    mmengine's Python configs have classes as types; registries find a class by its path, too.
    """
    has_classes = False

    def named(value: Any) -> Any:
        nonlocal has_classes
        if isinstance(value, dict):
            items = dict(dict.items(value))  # past ConfigDict, which builds what is lazy
            for key in ('type', 'of'):  # of: the type that `Quantized` builds
                kind = items.get(key)
                kind = kind.build() if isinstance(kind, (LazyAttr, LazyObject)) else kind
                if callable(kind):
                    has_classes, items[key] = True, dotted(kind)
            return {key: named(item) for key, item in items.items()}
        return type(value)(map(named, value)) if type(value) in (list, tuple) else value

    plain = dict(dict.items(cfg._cfg_dict))
    own = {k: v for k, v in plain.items() if not callable(v) and not isinstance(v, ModuleType)}
    new = named(own)
    return Config(new, filename=cfg.filename) if has_classes or len(own) < len(plain) else cfg


def build_model(cfg: Config) -> nn.Module:
    """Builds ``cfg.model`` in eval mode.

    Raises:
        ConfigError: If a type or an argument of the model is wrong; carries mmengine's message.
    """
    init_default_scope(cfg.get('default_scope') or 'mmdet3d')
    use_one_door()  # some modules load weights when they are built
    try:
        model = MODELS.build(copy.deepcopy(cfg.model))  # some detectors change theirs
    except QuantError:
        raise
    except REFUSALS as err:
        raise ConfigError(f'the model of {cfg.filename} cannot be built: {err}') from err
    model.eval()  # not chained: some models return None
    return model


def check_data(cfg: Config, entries: Sequence[str]) -> None:
    """Checks the data sets that entries of a config read, before long work begins.

    Of a nuScenes folder that is scored on, the tables and files are checked; of other data sets,
    and of a single frame, the folder and the info file.

    Args:
        cfg: The config.
        entries: Such as ``train_dataloader``; those that the config lacks are passed over.

    Raises:
        DatasetError: If data are missing, damaged, or without objects to train on.
    """
    folders: dict[tuple[str, str], dict[str, set[str]]] = {}
    for entry in entries:
        dataset = innermost(cfg.get(entry))
        root, infos = (str(dataset.get(key) or '') for key in ('data_root', 'ann_file'))
        if not infos or '://' in root + infos or dataset.get('backend_args'):
            continue  # not on this disk
        training = entry.startswith('train')
        own = entry.replace('_dataloader', '_evaluator')
        scored = cfg.get(own if own in cfg else 'val_evaluator') or []
        scored = scored if isinstance(scored, (list, tuple)) else [scored]
        metrics = {type_name(metric.get('type')) for metric in scored if isinstance(metric, dict)}
        nuscenes = type_name(dataset.get('type')) == 'NuScenesDataset'
        if nuscenes and 'NuScenesMetric' in metrics and not entry.startswith('calib'):
            version = (dataset.get('metainfo') or {}).get('version', 'v1.0-trainval')
            roles = folders.setdefault((root, version), dict(all=set(), train=set()))
            roles['all'].add(infos)
            roles['train'].update([infos] if training else [])
        else:
            _check_one(cfg, entry, Path(root), infos, training)
    for (root, version), roles in folders.items():
        small = sum(f.stat().st_size for f in Path(root, version).glob('*.json')) < _SMALL
        check(root, version, sorted(roles['all']), tables=small, training=roles['train'])


def _check_one(cfg: Config, entry: str, root: Path, infos: str, training: bool) -> None:
    where = f'{entry} of {cfg.filename}'
    if str(root) != '.' and not root.is_dir():
        raise DatasetError(
            f'{where}: {root} does not exist; set its data_root, or make a data set with '
            f'`mmdet3d-quant make_synthetic_nuscenes --out {root}`'
        )
    path = root / infos
    if not path.is_file():
        raise DatasetError(f'{where}: info file {path} is missing; set its data_root and ann_file')
    if training and path.suffix == '.pkl':
        check_objects(path, read_infos(path)['data_list'])


def innermost(loader: Any) -> Any:
    """Finds the data set in a data loader's config, without wrappers such as ``CBGSDataset``."""
    dataset = (loader or {}).get('dataset') or {}
    while dataset.get('dataset') is not None:
        dataset = dataset['dataset']
    return dataset


def calibration_entry(cfg: Config) -> str:
    """Finds the config's entry for calibration data, the first of :data:`CALIBRATION_LOADERS`.

    Raises:
        ConfigError: If it has none of them.
    """
    name = next((n for n in CALIBRATION_LOADERS if cfg.get(n) is not None), None)
    if name is None:
        raise ConfigError(f'{cfg.filename} has none of {", ".join(CALIBRATION_LOADERS)}')
    return name


def build_calibration_loader(cfg: Config) -> tuple[str, Any]:
    """Builds the loader of the calibration data, in a fixed order.

    Returns:
        Name of the config's entry, and the data loader.

    Raises:
        ConfigError: If the config has none of :data:`CALIBRATION_LOADERS`, or building it fails.
        DatasetError: If the data are not there.
    """
    name = calibration_entry(cfg)
    check_data(cfg, [name])
    init_default_scope(cfg.get('default_scope') or 'mmdet3d')
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
    """Lists indices into the data set, batch by batch, in the order of a loader.

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
        batch_sampler=[list(batch) for batch in indices.values()],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        pin_memory=loader.pin_memory,
    )
    yield from strict_zip(indices, part)


def evaluated_on(cfg: Config, name: str) -> list[str]:
    """Finds the entries of the config that evaluate on the data of another entry.

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
    return tuple(str(innermost(loader).get(key)) for key in ('data_root', 'ann_file'))


def pick_device(name: str | None) -> torch.device:
    """Chooses the device asked for, by default a GPU where there is one.

    Raises:
        ConfigError: If a GPU is asked for and there is none.
    """
    device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ConfigError('device cuda was asked for, but torch sees no GPU')
    return device
