"""Protocol of engines, and their latency; :mod:`mmdet3d_quant.engines` has the table of engines."""

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
        """Counts convolutions: those that run in INT8, and all; None if the engine cannot tell."""
        ...


def latency(engine: Engine, inputs: Arrays, runs: int = 10) -> float:
    """Measures the median seconds of ``runs`` runs, after one to warm up."""
    return float(np.median(list(race({'': engine}, inputs, runs))))


def race(engines: Mapping[str, Engine], inputs: Arrays, runs: int) -> Iterator[list[float]]:
    """Times engines in turns, so that other load on the machine affects all of them alike.

    Args:
        engines: Engines by name.
        inputs: Arrays by name, the same for all engines.
        runs: Number of rounds, after one to warm up.

    Yields:
        Per round a list of seconds, one per engine in the order of ``engines``.
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
