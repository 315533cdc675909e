"""Batches of a data set, numbered and shared out among processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Dict, List

from mmdet3d_quant.calibration.calibrate_model import num_held_out
from mmdet3d_quant.runs.from_config import numbered_batches

#: Indices into the data set by number of the batch.
Batches = Dict[int, List[int]]


def hold_out(batches: Batches) -> tuple[Batches, Batches]:
    """Holds the last batches out, as many as :func:`num_held_out` tells.

    Returns:
        Those that stay, and those held out.

    Raises:
        ValueError: If none would stay.
    """
    end = len(batches) - num_held_out(len(batches))
    if end <= 0:
        raise ValueError('the method auto needs at least 2 batches: it holds some out')
    items = list(batches.items())
    return dict(items[:end]), dict(items[end:])


@dataclass(frozen=True)
class Share:
    """Batches to calibrate on, and which of them are this process's.

    Attributes:
        name: The loader's entry in the config.
        loader: Where the data set and the way to load it come from.
        seen: Batches to observe.
        held_out: Batches that the method auto tries its choices on.
        rank: Number of this process.
        world: Number of processes.
    """

    name: str
    loader: Any
    seen: Batches
    held_out: Batches
    rank: int
    world: int

    def load(self, batches: Mapping[int, list[int]]) -> Iterator[tuple[int, Any]]:
        """Loads every ``world``-th of some batches, from this process's number on."""
        numbers = list(batches)[self.rank :: self.world]
        return numbered_batches(self.loader, {n: batches[n] for n in numbers})
