#!/usr/bin/env python
"""Make a data set in the form of nuScenes v1.0-mini: generated streets, six cameras, a LiDAR."""

from __future__ import annotations

import argparse

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from terminal import open_console, run_tool

from mmdet3d_quant.synthetic.generate import make_synthetic_nuscenes
from mmdet3d_quant.synthetic.light import HOURS
from mmdet3d_quant.synthetic.record import Settings
from mmdet3d_quant.synthetic.tables import TRAIN_SCENES, VAL_SCENES

EXAMPLE = """
examples:
  # 8 training scenes of 160 key frames, 2 validation scenes of 80: about 3.5 GB
  python tools/make_synthetic_nuscenes.py --out data/synthetic --samples 160 --val-samples 80

  # a few frames to look at, without info files
  python tools/make_synthetic_nuscenes.py --out /tmp/few --scene-names scene-0103 --samples 4 \\
      --no-infos

The same seed gives the same bytes, whatever the number of workers; fewer samples or scenes give a
part of the same data. Use it with data_root=OUT and metainfo=dict(version='v1.0-mini').
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Settings()
    scenes = TRAIN_SCENES + VAL_SCENES
    add = parser.add_argument
    add('--out', required=True, help='folder to write')
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        '--scenes', type=int, default=10, help='first N scenes: 8 for training, then 2 for '
        'validation; default: %(default)s',
    )  # fmt: skip
    group.add_argument('--scene-names', nargs='+', metavar='NAME', help='of ' + ', '.join(scenes))
    add('--samples', type=int, default=40, help='key frames a training scene; %(default)s')
    add('--val-samples', type=int, help='key frames a validation scene; default: like --samples')
    add('--seed', type=int, default=default.seed, help='default: %(default)s')
    add('--sweeps', type=int, default=default.sweeps, help='before a key frame; %(default)s')
    add('--sweep-interval', type=float, default=default.sweep_interval, help='s; %(default)s')
    add('--block', type=int, default=default.block, help='key frames of one layout; %(default)s')
    add('--width', type=int, default=default.width, help='of images, pixels; %(default)s')
    add('--radius', type=float, default=default.radius, help='of labels, metres; %(default)s')
    add('--hours', nargs='+', choices=list(HOURS), default=default.hours, help='times of day; all')
    add('--workers', type=int, help='processes; default: one per processor')
    add('--overwrite', action='store_true', help='replace what is in the folder')
    add('--no-infos', action='store_true', help="do not run mmdet3d's converter")
    add('--gt-database', action='store_true', help='also cut out objects, for ObjectSample')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    console = open_console()
    names = args.scene_names or (TRAIN_SCENES + VAL_SCENES)[: max(args.scenes, 0)]
    if args.scenes > 10:
        raise ValueError(f'nuScenes mini has 10 scenes, got --scenes {args.scenes}')
    settings = Settings(
        seed=args.seed,
        block=args.block,
        width=args.width,
        sweeps=args.sweeps,
        sweep_interval=args.sweep_interval,
        radius=args.radius,
        hours=tuple(args.hours),
    )
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task('Key frames', visible=False)

        def show(done: int, total: int) -> None:
            finished = done == total and not args.no_infos
            text = "Key frames, mmdet3d's converter" if finished else 'Key frames'
            progress.update(task, completed=done, total=total, description=text, visible=True)

        out = make_synthetic_nuscenes(
            args.out,
            names,
            args.samples,
            args.val_samples,
            settings,
            args.workers,
            infos=not args.no_infos,
            gt_database=args.gt_database,
            overwrite=args.overwrite,
            progress=show,
        )
    size = sum(f.stat().st_size for f in out.rglob('*') if f.is_file())
    console.print(f'Wrote {out}: {size / 1e9:.2f} GB')


if __name__ == '__main__':
    run_tool(main, interrupted='nothing was written')
