"""What tools/train.py and tools/test.py share: flags, and a config for mmengine's Runner."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from mmdet3d.utils import replace_ceph_backend
from mmengine.config import Config, DictAction
from processes import join

import mmdet3d_quant  # noqa: F401  registers the Quant* types, whatever the config imports
import mmdet3d_quant.optim  # noqa: F401  for --amp without a GPU
import mmdet3d_quant.qat  # noqa: F401  registers QATHook and DistillHook
from mmdet3d_quant.from_config import ConfigError, read_config
from mmdet3d_quant.synthetic.check import check

#: Tables of more megabytes are not read through at every start: v1.0-trainval takes a minute.
_SMALL = 300


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that mmdet3d's tools have in common."""
    parser.add_argument('--ceph', action='store_true', help='read the data from Ceph')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE overrides of the config'
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by torch')


def runner_config(args: argparse.Namespace, needs: tuple[str, ...]) -> Config:
    """The config that a tool was given, ready for the Runner.

    Raises:
        ConfigError: If it cannot be read or lacks an entry of ``needs``.
        DatasetError: If a nuScenes folder that it names is incomplete or damaged.
        ValueError: If the launcher did not start this process.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    join(args.launcher)
    cfg = read_config(args.config)
    if args.ceph:
        cfg = replace_ceph_backend(cfg)
    cfg.merge_from_dict(args.cfg_options or {})
    missing = [name for name in needs if cfg.get(name) is None]
    if missing:
        raise ConfigError(f'config {args.config} has no {", ".join(missing)}')
    check_data(cfg, needs)
    cfg.launcher = args.launcher
    if args.launcher != 'none' and not torch.cuda.is_available() and 'model_wrapper_cfg' not in cfg:
        cfg.model_wrapper_cfg = dict(  # mmengine's default, less the number of a GPU
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
    cfg.work_dir = (
        args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    )
    return cfg


def check_data(cfg: Config, needs: tuple[str, ...]) -> None:
    """Looks through the nuScenes folders that the needed entries read and are scored on."""
    found: dict[tuple[str, str], set[str]] = {}
    for name in needs:
        dataset = (cfg[name] or {}).get('dataset')
        while dataset is not None and dataset.get('dataset') is not None:
            dataset = dataset.dataset  # inside a wrapper such as CBGSDataset
        if dataset is None or dataset.type != 'NuScenesDataset':
            continue
        scored = cfg.get(name.replace('_dataloader', '_evaluator')) or cfg.get('val_evaluator')
        if scored is not None and scored.get('type') == 'NuScenesMetric':
            version = dataset.get('metainfo', {}).get('version', 'v1.0-trainval')
            found.setdefault((dataset.data_root, version), set()).add(dataset.ann_file)
    for (root, version), infos in found.items():
        check(root, version, sorted(infos), tables=_megabytes(Path(root) / version) < _SMALL)


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob('*.json')) / 1e6
