"""Variants of one graph side by side: how fast, how close to float, how large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmdet3d_quant.check.align import align
from mmdet3d_quant.check.runs import sqnr
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines import Arrays, Engine, make_engine, race
from mmdet3d_quant.export.inputs import random_input


@dataclass(frozen=True)
class Variant:
    """Measurements of one file of a graph.

    Attributes:
        name: How it is called.
        seconds: Of every run.
        sqnr: Of every output against the first variant's, over all samples, in dB.
        megabytes: Size of the file, and of the one with its weights.
        int8: Convolutions that run in INT8, and all; None where the engine does not tell.
        memory: Megabytes that it adds to the peak of a process; None if not measured.
    """

    name: str
    seconds: list[float]
    sqnr: dict[str, float]
    megabytes: float
    int8: tuple[int, int] | None
    memory: float | None

    @property
    def milliseconds(self) -> tuple[float, float, float]:
        """Median and quartiles of a run."""
        return quartiles(np.array(self.seconds) * 1e3)

    def faster_than(self, other: Variant) -> tuple[float, float, float]:
        """Median and quartiles of the other's time over this one's, round by round."""
        return quartiles(np.array(other.seconds) / np.array(self.seconds))


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    first, middle, third = np.percentile(values, (25, 50, 75))
    return float(middle), float(first), float(third)


def compare(
    files: dict[str, Path],
    engine: str,
    num_threads: int,
    samples: Arrays,
    runs: int,
    memory: Callable[[str], float] | None = None,
    done: Callable[[], None] = lambda: None,
) -> list[Variant]:
    """Runs variants of a graph on the same inputs, in turn.

    Args:
        files: By name; the first one is the reference, normally float.
        engine: A key of ``ENGINES``.
        num_threads: CPU threads.
        samples: Inputs by name, samples along a new first axis; the first sample is timed.
        runs: Rounds.
        memory: Gives the memory of a variant, by name.
        done: Called after every round.

    Raises:
        EngineError: If a file cannot be read.
        ValueError: If an input is missing or of another shape, outputs differ in name, or one is
            NaN or infinite.
    """
    made = {name: make_engine(engine, path, num_threads) for name, path in files.items()}
    outputs = {name: _outputs(run, samples) for name, run in made.items()}
    reference = next(iter(outputs.values()))
    for name, found in outputs.items():
        if found[0].keys() != reference[0].keys():
            raise ValueError(
                f'{files[name]} has outputs {", ".join(found[0])}, the first file has '
                f'{", ".join(reference[0])}: they are not variants of one graph'
            )
    for name, found in outputs.items():
        for key in found[0]:
            odd = sum(int((~np.isfinite(sample[key])).sum()) for sample in found)
            if odd:
                raise ValueError(
                    f'{files[name]}: {odd} values of its output {key} are NaN or infinite; '
                    'tools/parity.py names the layer'
                )
    times = []
    for row in race(made, first_of(samples), runs):
        times.append(row)
        done()
    return [
        Variant(
            name,
            list(seconds),
            _closeness(reference, outputs[name]),
            _size(files[name]),
            made[name].int8_convolutions(),
            memory(name) if memory else None,
        )
        for name, seconds in strict_zip(files, strict_zip(*times))
    ]


def first_of(samples: Arrays) -> Arrays:
    """The first sample."""
    return {name: value[0] for name, value in samples.items()}


def _outputs(engine: Engine, samples: Arrays) -> list[Arrays]:
    count = len(next(iter(samples.values())))
    return [engine({name: value[i] for name, value in samples.items()}) for i in range(count)]


def _closeness(reference: list[Arrays], found: list[Arrays]) -> dict[str, float]:
    """SQNR by output over all samples."""
    found = [align(there, here) for there, here in strict_zip(reference, found)]
    return {
        name: sqnr(np.stack([r[name] for r in reference]), np.stack([f[name] for f in found]))
        for name in reference[0]
    }


def _size(path: Path) -> float:
    beside = [path.with_suffix('.bin'), path.with_name(f'{path.name}.data')]
    return sum(file.stat().st_size for file in (path, *beside) if file.is_file()) / 1e6


def generate_samples(shapes: dict[str, tuple], count: int, seed: int = 0) -> Arrays:
    """Random inputs for a graph.

    Args:
        shapes: By name.
        count: Number of samples.
        seed: Of the generator.

    Returns:
        float32 (count, *shape) by name, as ``export.inputs.random_input`` draws them.

    Raises:
        ValueError: If a size is open.
    """
    rng = torch.Generator().manual_seed(seed)
    samples = {}
    for name, shape in shapes.items():
        if not all(isinstance(size, int) for size in shape):
            raise ValueError(f'input {name!r} has the shape {shape}: give inputs in a file')
        samples[name] = random_input(name, (count, *shape), rng).numpy()
    return samples
