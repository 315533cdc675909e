"""Shared parts of tools/train.py and tools/test.py: flags, and a config for the Runner."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from mmdet3d.utils import replace_ceph_backend
from mmengine.config import Config, DictAction

import mmdet3d_quant  # noqa: F401  registers the Quant* types, whatever the config imports
import mmdet3d_quant.qat  # noqa: F401  registers QATHook and DistillHook
import mmdet3d_quant.qat.optim  # noqa: F401  for --amp without a GPU
from mmdet3d_quant.files.checkpoint import use_one_door
from mmdet3d_quant.runs.from_config import ConfigError, read_config
from mmdet3d_quant.runs.processes import join


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
    """The config that a tool was given, ready for the Runner, which reads checkpoints safely.

    Raises:
        ConfigError: If it cannot be read or lacks an entry of ``needs``, or if the launcher did
            not start this process.
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
    use_one_door()
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
