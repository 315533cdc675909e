"""Statistics of an unfinished calibration on disk, so that it can be resumed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmdet3d_quant.calibration.observe import Statistics
from mmdet3d_quant.calibration.stability import Stability
from mmdet3d_quant.files.outputs import whole

#: Least seconds between two writes; a power cut loses no more.
INTERVAL = 2.0


class ResumeError(ValueError):
    """Unfinished statistics do not fit this run, are damaged, or are there without ``resume``."""


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
        """Merges the files of an earlier run (any number of processes) into ``statistics``.

        Rewrites them as this process's file. Call it on rank 0, before any other rank saves.

        Args:
            statistics: Statistics to add to.
            stability: Gets the looks of the earlier run.
            resume: Whether files of an earlier run may be there.

        Returns:
            Number of batches in ``statistics`` afterwards.

        Raises:
            ResumeError: If there are files and ``resume`` is False, or a file is damaged or has
                another key.
        """
        files = sorted(self.folder.glob('rank*.pth'))
        if files and not resume:
            raise ResumeError(
                f'{self.folder} holds an unfinished calibration: go on with --resume, or delete '
                'the folder to start again'
            )
        for path in files:
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
            if not part.batches <= statistics.batches:  # else an earlier load was cut off
                statistics.merge(part)
            if len(looks) > len(stability.looks):
                stability.load_state_dict(looks)
        if files:
            self.save(statistics, stability, now=True)
            for path in files:
                if path != self.path:
                    path.unlink()
        return len(statistics.batches)

    def save(self, statistics: Statistics, stability: Stability, now: bool = False) -> None:
        """Writes this process's file, unless the last write is less than ``INTERVAL`` ago.

        Args:
            statistics: Statistics to write.
            stability: Looks to write.
            now: Write in any case.
        """
        if not now and time.monotonic() - self._written < INTERVAL:
            return
        with whole(self.path) as part:
            state = dict(statistics=statistics.state_dict(), looks=stability.state_dict())
            torch.save(dict(state, key=self.key), part)
        self._written = time.monotonic()

    def clear(self) -> None:
        """Removes the folder, once the output is written."""
        for path in self.folder.glob('rank*.pth'):
            path.unlink()
        if self.folder.is_dir():
            self.folder.rmdir()
