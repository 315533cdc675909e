#!/usr/bin/env python
"""Evaluate a checkpoint: mmdet3d's test entry point, for float and quantized models."""

from __future__ import annotations

import argparse

from launch import add_common, runner_config
from mmengine.config import ConfigDict
from mmengine.runner import Runner
from terminal import run_tool

import mmdet3d_quant as mq
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.wrappers import accept_wrapped

TASKS = ('mono_det', 'multi-view_det', 'lidar_det', 'lidar_seg', 'multi-modality_det')
EXAMPLE = """
examples:
  CONFIG=configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_int8_synthetic.py

  python tools/test.py $CONFIG int8.pth            # mAP and NDS of the INT8 simulation
  python tools/test.py $CONFIG int8.pth --float    # of the same weights without quantization
  python tools/test.py $CONFIG int8.pth --show-dir boxes --task multi-modality_det
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='test config')
    parser.add_argument('checkpoint', help='checkpoint of a float or a calibrated model')
    parser.add_argument('--work-dir', help='for the log and the metrics; default: work_dirs/CONFIG')
    parser.add_argument('--float', action='store_true', help='switch quantization off')
    parser.add_argument('--show', action='store_true', help='show detections in a window')
    parser.add_argument('--show-dir', help='write pictures of the detections to this folder')
    parser.add_argument('--score-thr', type=float, default=0.1, help='least score of a shown box')
    parser.add_argument('--task', choices=TASKS, help='how to draw; needed to show')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds between pictures')
    parser.add_argument('--tta', action='store_true', help="use the config's tta_model")
    add_common(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    if (args.show or args.show_dir) and args.task is None:
        raise ValueError(f'--show and --show-dir need --task, one of {", ".join(TASKS)}')
    cfg = runner_config(args, needs=('test_dataloader', 'test_evaluator'))
    # A checkpoint that does not fit, or a quantized model without ranges, is an error now, not
    # after the data set is read or never.
    fc.load_weights(fc.build_model(cfg), args.checkpoint, calibrated=not args.float)
    fc.check_data(cfg, ['test_dataloader'])
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        hook = cfg.get('default_hooks', {}).get('visualization')
        if hook is None:
            raise fc.ConfigError(
                "to show, the config needs default_hooks.visualization=dict(type='"
                "Det3DVisualizationHook')"
            )
        hook.update(draw=True, vis_task=args.task, score_thr=args.score_thr)
        if args.show:
            hook.update(show=True, wait_time=args.wait_time)
        if args.show_dir:
            hook.update(test_out_dir=args.show_dir)
    if args.tta:
        if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
            raise fc.ConfigError('--tta needs tta_model and tta_pipeline in the config')
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    runner = Runner.from_cfg(cfg)
    accept_wrapped(runner.model)
    with mq.set_mode(runner.model, 'float' if args.float else 'quant'):
        return runner.test()


if __name__ == '__main__':
    run_tool(main)
