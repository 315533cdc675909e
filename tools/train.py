#!/usr/bin/env python
"""Train a detector, float or quantized (QAT): mmdet3d's training entry point."""

from __future__ import annotations

import argparse
import os
import sys

import torch
from launch import add_common, runner_config
from mmengine.config import Config
from mmengine.runner import Runner

from mmdet3d_quant import UncalibratedError
from mmdet3d_quant import from_config as fc
from mmdet3d_quant.files import CheckpointError
from mmdet3d_quant.from_config import ConfigError

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
        kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
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
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
        if cfg.load_from and not os.path.isfile(cfg.load_from):
            raise CheckpointError(f'checkpoint {cfg.load_from} does not exist')
    else:
        check_start(cfg)
    Runner.from_cfg(cfg).train()


def check_start(cfg: Config) -> None:
    """Looks at what a QAT run starts from before data are loaded.

    Raises:
        CheckpointError: If ``load_from`` cannot be read or does not fit.
        ConfigError: If there is none.
        UncalibratedError: If the model has a quantizer without a range.
    """
    hooks = [hook.get('type') for hook in cfg.get('custom_hooks') or [] if isinstance(hook, dict)]
    if 'QATHook' not in hooks:
        return
    if not cfg.get('load_from'):
        raise ConfigError('a config with QATHook needs load_from, a checkpoint of calibrate.py')
    fc.load_weights(fc.build_model(cfg), cfg.load_from, calibrated=True)


if __name__ == '__main__':
    try:
        main()
    except (CheckpointError, ConfigError, UncalibratedError, OSError) as err:
        sys.exit(f'error: {err}')
