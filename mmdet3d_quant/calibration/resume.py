"""The part of a calibration that is done, on disk, so that stopping loses nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmdet3d_quant.calibration.observe import Statistics
from mmdet3d_quant.calibration.stability import Stability
from mmdet3d_quant.files.outputs import whole

#: Seconds between two writes: what a power cut may cost.
INTERVAL = 2.0


class ResumeError(ValueError):
    """An interrupted calibration cannot be gone on with, or would be thrown away."""


class Progress:
    """Statistics of an unfinished run, one file per process in a folder beside the output.

    Args:
        out: The checkpoint that calibration is to write.
        key: All that decides the statistics, as plain values. A run only goes on with statistics
            of an equal key; the method is no part of it.
        rank: Number of this process.
    """

    def __init__(self, out: str | Path, key: Mapping[str, Any], rank: int = 0) -> None:
        self.folder = Path(f'{out}.partial')
        self.key = dict(key)
        self.path = self.folder / f'rank{rank}.pth'
        self._written = time.monotonic()

    def load(self, statistics: Statistics, stability: Stability, resume: bool) -> int:
        """Adds what earlier processes left, whatever their number, to the statistics.

        It is one file then. Call it in one process, before the others write theirs.

        Args:
            statistics: To add to.
            stability: Takes over the looks at the ranges.
            resume: Whether it is wanted.

        Returns:
            Number of batches found.

        Raises:
            ResumeError: If files are there and not wanted, or belong to something else.
        """
        found = sorted(self.folder.glob('rank*.pth'))
        if found and not resume:
            raise ResumeError(
                f'{self.folder} holds an unfinished calibration: go on with --resume, or delete '
                'the folder to start again'
            )
        for path in found:
            try:
                saved = torch.load(path, weights_only=True)
                key, state, looks = saved['key'], saved['statistics'], saved['looks']
            except Exception as err:  # whatever torch raises on a damaged file
                raise ResumeError(f'{path} is damaged: delete {self.folder}') from err
            other = [name for name in self.key if key.get(name) != self.key[name]]
            if other:
                raise ResumeError(
                    f'{self.folder} is of another run: its {", ".join(other)} differ(s); delete '
                    'the folder to start again'
                )
            part = Statistics(statistics.histograms)
            part.load_state_dict(state)
            if not part.batches <= statistics.batches:  # else stopped while doing what follows
                statistics.merge(part)
            if len(looks) > len(stability.looks):
                stability.load_state_dict(looks)
        if found:
            self.save(statistics, stability, now=True)
            for path in found:
                if path != self.path:
                    path.unlink()
        return len(statistics.batches)

    def save(self, statistics: Statistics, stability: Stability, now: bool = False) -> None:
        """Writes the statistics of this process, if the last time is long enough ago."""
        if not now and time.monotonic() - self._written < INTERVAL:
            return
        with whole(self.path) as part:
            state = dict(statistics=statistics.state_dict(), looks=stability.state_dict())
            torch.save(dict(state, key=self.key), part)
        self._written = time.monotonic()

    def clear(self) -> None:
        """Removes the folder: the output is there."""
        for path in self.folder.glob('rank*.pth'):
            path.unlink()
        if self.folder.is_dir():
            self.folder.rmdir()
