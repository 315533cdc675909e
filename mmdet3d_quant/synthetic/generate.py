"""Makes a whole data set, block by block in several processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Callable, Sequence

import cv2

from mmdet3d_quant.files.outputs import whole_folder
from mmdet3d_quant.synthetic.infos import make_infos
from mmdet3d_quant.synthetic.light import HOURS
from mmdet3d_quant.synthetic.record import Settings, record_block
from mmdet3d_quant.synthetic.sensors import LIDAR
from mmdet3d_quant.synthetic.tables import (
    CHANNELS,
    TRAIN_SCENES,
    VAL_SCENES,
    write_tables,
)
from mmdet3d_quant.synthetic.world import KEYFRAME_INTERVAL

#: Tells a generated set, and from what it was generated.
MARK = 'synthetic.json'
#: Disk space that a key frame takes at most, bytes: six images and its point clouds.
_IMAGES, _SCAN = 900_000, 700_000


def make_synthetic_nuscenes(
    out: str | Path,
    scenes: Sequence[str] = TRAIN_SCENES + VAL_SCENES,
    samples: int = 40,
    val_samples: int | None = None,
    settings: Settings | None = None,
    workers: int | None = None,
    infos: bool = True,
    gt_database: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes a generated data set in the form of nuScenes v1.0-mini.

    A block of a scene depends on ``settings`` and nothing else: fewer scenes or samples give a part
    of the larger data set, whatever the number of workers. More than one worker starts new
    processes, which import the main module: call this function below ``if __name__ == '__main__'``,
    so that they do not call it again.

    Args:
        out: Folder to create.
        scenes: Names of scenes of nuScenes mini to generate.
        samples: Key frames of each training scene, 0.5 s apart.
        val_samples: Key frames of each validation scene; default: ``samples``.
        settings: Settings that decide the content.
        workers: Processes; default: one per processor.
        infos: Also run mmdet3d's converter, for ``nuscenes_infos_*.pkl``.
        gt_database: Also cut out the objects of the training scenes, for ``ObjectSample``.
        overwrite: Replace an earlier generated set in ``out``.
        progress: Called with key frames done and in total.

    Returns:
        ``out``.

    Raises:
        ValueError: If an argument makes no sense.
        FileExistsError: If ``out`` holds files already, and they are no generated set or
            ``overwrite`` is not set.
        OSError: If ``out`` cannot be written to or the disk is too small.
        ConverterError: If mmdet3d's converter fails.
    """
    settings = settings or Settings()
    val_samples = samples if val_samples is None else val_samples
    counts = {s: val_samples if s in VAL_SCENES else samples for s in scenes}
    check_arguments(counts, settings, workers)
    out = Path(out)
    total = sum(counts.values())
    _check_folder(out, total * (_IMAGES + _SCAN * (1 + settings.sweeps)), overwrite)
    with whole_folder(out) as part:
        for channel in CHANNELS:
            (part / 'samples' / channel).mkdir(parents=True)
        (part / 'sweeps' / LIDAR).mkdir(parents=True)
        jobs = [
            (part, settings, scene, index, count)
            for scene, count in counts.items()
            for index in range(count // settings.block)
        ]
        blocks = []
        for rows in _run(jobs, workers or os.cpu_count() or 1):
            blocks.append(rows)
            if progress:
                progress(len(blocks) * settings.block, total)
        write_tables(part, counts, settings.width, blocks)
        (part / MARK).write_text(json.dumps(dict(samples=counts, **settings._asdict()), indent=1))
        if infos or gt_database:
            make_infos(part, max_sweeps=settings.sweeps, gt_database=gt_database)
        if overwrite:
            _clear(out, keep=part)
    return out


def _run(jobs: list[tuple], workers: int):
    """Records the blocks in processes; yields the table rows of each, in order."""
    if min(workers, len(jobs)) == 1:
        yield from (record_block(*job) for job in jobs)
        return
    context = multiprocessing.get_context('spawn')  # forking a process with threads may hang
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_one_thread) as pool:
        tasks = [pool.submit(_record, job) for job in jobs]
        try:
            yield from (task.result() for task in tasks)
        except BrokenProcessPool:
            raise OSError(
                'a worker process died, maybe for lack of memory: ask for fewer'
            ) from None
        finally:
            for task in tasks:
                task.cancel()


def _one_thread() -> None:
    cv2.setNumThreads(1)


def _record(job: tuple):
    return record_block(*job)


def check_arguments(counts: dict[str, int], settings: Settings, workers: int | None) -> None:
    """Checks the arguments of :func:`make_synthetic_nuscenes`.

    Raises:
        ValueError: If one is invalid; names it, its value and the expected values.
    """
    known = TRAIN_SCENES + VAL_SCENES
    if not counts:
        raise ValueError('no scenes to make')
    if not 2 <= settings.block <= 10:
        raise ValueError(
            f'block must be from 2 (a velocity needs two key frames) to 10, got {settings.block}'
        )
    for scene, count in counts.items():
        if scene not in known:
            raise ValueError(f'{scene!r} is no scene of nuScenes mini; choose from {known}')
        if count < 1 or count % settings.block:
            raise ValueError(
                f'{scene}: samples must be a positive multiple of block ({settings.block}), so '
                f'that every object is seen at least twice; got {count}'
            )
    if settings.seed < 0:
        raise ValueError(f'seed must not be negative, got {settings.seed}')
    if settings.width % 16 or not 160 <= settings.width <= 1600:
        raise ValueError(f'width must be a multiple of 16 from 160 to 1600, got {settings.width}')
    if not 0 <= settings.sweeps <= 9:
        raise ValueError(f'sweeps must be from 0 to 9, got {settings.sweeps}')
    if settings.sweep_interval <= 0 or (
        settings.sweeps * settings.sweep_interval >= KEYFRAME_INTERVAL - 1e-9
    ):
        raise ValueError(
            f'{settings.sweeps} sweeps {settings.sweep_interval} s apart do not fit between key '
            f'frames, which are {KEYFRAME_INTERVAL} s apart'
        )
    if not 10 <= settings.radius <= 45:
        raise ValueError(f'radius must be from 10 to 45 metres, got {settings.radius}')
    if not settings.hours or not set(settings.hours) <= set(HOURS):
        raise ValueError(f'hours must be some of {tuple(HOURS)}, got {settings.hours}')
    if workers is not None and workers < 1:
        raise ValueError(f'workers must be at least 1, got {workers}')


def _check_folder(out: Path, size: int, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f'{out} is a file, not a folder')
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise FileExistsError(f'{out} is not empty; choose another folder or --overwrite it')
        if not (out / MARK).is_file():
            raise FileExistsError(f'{out} holds no generated data set (no {MARK}); left alone')
    at = next(p for p in [out, *out.absolute().parents] if p.exists())
    free = shutil.disk_usage(at).free
    if free < size:
        raise OSError(
            f'{out} needs up to {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: ask for fewer '
            'scenes, samples or sweeps'
        )


def _clear(out: Path, keep: Path) -> None:
    for path in out.iterdir():
        if path != keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
