"""The protocol of engines, and how to time them; :mod:`mmdet3d_quant.engines` has their table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Dict, Protocol

import numpy as np

Arrays = Dict[str, np.ndarray]


class Engine(Protocol):
    """Runs a graph: named arrays in, named arrays out.

    Attributes:
        input_shapes: Shapes of the graph's inputs, by name; text where a size is open.
    """

    input_shapes: dict[str, tuple[Any, ...]]

    def __call__(self, inputs: Arrays) -> Arrays:
        """Runs the graph once."""
        ...

    def int8_convolutions(self) -> tuple[int, int] | None:
        """Convolutions that run in INT8, and all; None where the engine does not tell."""
        ...


def latency(engine: Engine, inputs: Arrays, runs: int = 10) -> float:
    """Median seconds of a run, after one to warm up."""
    return float(np.median(list(race({'': engine}, inputs, runs))))


def race(engines: Mapping[str, Engine], inputs: Arrays, runs: int) -> Iterator[list[float]]:
    """Engines take turns, so that the machine's moods hit all of them.

    Args:
        engines: By name.
        inputs: Same for all.
        runs: Rounds, after one to warm up.

    Yields:
        Seconds of every engine, in order, round by round.
    """
    for engine in engines.values():
        engine(inputs)
    for _ in range(runs):
        times = []
        for engine in engines.values():
            start = time.perf_counter()
            engine(inputs)
            times.append(time.perf_counter() - start)
        yield times
