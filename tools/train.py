#!/usr/bin/env python
"""Train a detector, float or quantized (QAT): mmdet3d's training entry point."""

from __future__ import annotations

import argparse
from typing import Any, Iterator

import torch
from launch import add_common, runner_config
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import HOOKS, init_default_scope
from mmengine.runner import Runner
from terminal import run_tool

from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.naming import type_name
from mmdet3d_quant.files.checkpoint import CheckpointError, latest, read_checkpoint, read_training
from mmdet3d_quant.qat import QATHook
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.conversion import maker_of
from mmdet3d_quant.runs.from_config import ConfigError
from mmdet3d_quant.runs.wrappers import accept_wrapped

#: Name of the initialisation in the registry, and of its class.
PRETRAINED = ('Pretrained', 'PretrainedInit')
EXAMPLE = """
examples:
  CONFIG=configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_synthetic.py

  python tools/train.py $CONFIG
  python tools/train.py $CONFIG --resume          # go on from the last checkpoint
  python tools/train.py $CONFIG --cfg-options train_dataloader.batch_size=2 randomness.seed=1
  torchrun --nproc-per-node 4 tools/train.py $CONFIG --launcher pytorch

  # QAT: calibrate, then train the calibrated checkpoint with the QATHook of the config
  INT8=configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_int8_synthetic.py
  QAT=configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_qat_synthetic.py
  python tools/calibrate.py $INT8 checkpoints/bevfusion_tiny_lidar-cam_synthetic.pth \\
      --out work_dirs/int8.pth
  python tools/train.py $QAT
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='training config')
    parser.add_argument('--work-dir', help='for logs and checkpoints; default: work_dirs/CONFIG')
    parser.add_argument('--amp', action='store_true', help='mixed precision (bfloat16 on a CPU)')
    parser.add_argument(
        '--sync_bn',
        choices=['none', 'torch', 'mmcv'],
        default='none',
        help='convert batch norm to a synchronised one',
    )
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help="scale the learning rate by the config's rule"
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='checkpoint to go on from; without one, the last of the work dir',
    )
    add_common(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = runner_config(args, needs=('train_dataloader', 'train_cfg', 'optim_wrapper'))
    if args.amp:
        kind = type_name(cfg.optim_wrapper.get('type', 'OptimWrapper'))
        if kind not in ('OptimWrapper', 'AmpOptimWrapper', 'BFloat16OptimWrapper'):
            raise ConfigError(f'--amp works with OptimWrapper, not with the {kind} of the config')
        if torch.cuda.is_available():
            cfg.optim_wrapper.type = 'AmpOptimWrapper'
            cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
        else:
            cfg.optim_wrapper.type = 'BFloat16OptimWrapper'
    if args.sync_bn != 'none':
        cfg.sync_bn = args.sync_bn
    if args.auto_scale_lr:
        rule = cfg.get('auto_scale_lr') or {}
        if 'enable' not in rule or 'base_batch_size' not in rule:
            raise ConfigError(
                '--auto-scale-lr needs auto_scale_lr=dict(enable=..., base_batch_size=...) in '
                'the config'
            )
        cfg.auto_scale_lr.enable = True
    if not find_resume(cfg, args.resume):
        check_start(cfg)
    for path in pretrained(cfg.model):
        read_checkpoint(path)
    fc.check_data(cfg, ['train_dataloader', 'val_dataloader'])
    runner = Runner.from_cfg(cfg)
    accept_wrapped(runner.model)
    runner.train()


def find_resume(cfg: Config, asked: str | None) -> bool:
    """Sets the checkpoint that a training goes on from, and checks it before data are loaded.

    Args:
        cfg: The config; its ``resume`` and ``load_from`` are set.
        asked: ``--resume``: a checkpoint, ``'auto'`` for the last of the work dir, or None.

    Returns:
        Whether there is a checkpoint to go on from.

    Raises:
        CheckpointError: If it is missing, no checkpoint of a training, or unsafe to read.
    """
    if asked is None and not cfg.get('resume'):
        return False
    path = cfg.get('load_from') if asked is None else None if asked == 'auto' else asked
    path = path or latest(cfg.work_dir)
    if path is None:
        print_log(f'Nothing to resume in {cfg.work_dir}: starting anew', logger='current')
        cfg.resume = False
        return False
    if '://' not in path:
        read_training(path)
    cfg.resume, cfg.load_from = True, path
    return True


def check_start(cfg: Config) -> None:
    """Checks the weights that a run starts from, before data are loaded.

    Raises:
        CheckpointError: If ``load_from`` cannot be read; in a QAT run also if it does not fit.
        ConfigError: If a QAT run has no ``load_from``.
        UncalibratedError: If the model of a QAT run has a quantizer without a range.
    """
    start = cfg.get('load_from')
    if is_qat(cfg):
        if not start:
            raise ConfigError('a config with QATHook needs load_from, a checkpoint of calibrate.py')
        fc.load_weights(fc.build_model(cfg), start, calibrated=True)
    elif start and '://' not in start:
        maker = maker_of(read_checkpoint(start)['state_dict'])
        if maker and 'encoders' not in cfg.model:  # mmengine would load nothing of it and begin
            raise CheckpointError(f'load_from={start} is {maker}')


def is_qat(cfg: Config) -> bool:
    """Tells whether a hook of the config is a QATHook, by whatever name, or a subclass of it."""
    init_default_scope(cfg.get('default_scope') or 'mmdet3d')
    hooks = [*(cfg.get('custom_hooks') or []), *(cfg.get('default_hooks') or {}).values()]
    kinds = [hook.get('type') for hook in hooks if isinstance(hook, dict)]
    found = [HOOKS.get(kind) if isinstance(kind, str) else kind for kind in kinds]
    return any(isinstance(kind, type) and issubclass(kind, QATHook) for kind in found)


def pretrained(cfg: Any) -> Iterator[str]:
    """Checkpoints on this disk that parts of a model are initialised from."""
    if isinstance(cfg, dict):
        if type_name(cfg.get('type')) in PRETRAINED and '://' not in cfg.get('checkpoint', ''):
            yield cfg['checkpoint']
        cfg = list(cfg.values())
    for part in cfg if isinstance(cfg, (list, tuple)) else ():
        yield from pretrained(part)


if __name__ == '__main__':
    run_tool(main, errors=(QuantError, OSError))
