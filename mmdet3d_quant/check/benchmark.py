"""Measures sets of files: every graph's variants in turn, their memory, and NNCF's variant."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any, Dict, List

import numpy as np

from mmdet3d_quant.check.compare import Variant, compare, first_of, generate_samples
from mmdet3d_quant.check.nncf import PEER, Nncf
from mmdet3d_quant.check.variants import StoredInputs
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines import Arrays, make_engine
from mmdet3d_quant.engines.memory import added_memory
from mmdet3d_quant.files.plain import finite_or_text
from mmdet3d_quant.runs.listener import Listener

#: Variants by the name of their graph.
Results = Dict[str, List[Variant]]


def benchmark(
    graphs: Mapping[str, Mapping[str, Path]],
    engine: str = 'openvino',
    num_threads: int = 2,
    runs: int = 30,
    *,
    inputs: Path | None = None,
    num_samples: int = 2,
    memory: bool = True,
    nncf: Nncf | None = None,
    nncf_inputs: Path | None = None,
    listener: Listener | None = None,
) -> Iterator[tuple[str, list[Variant]]]:
    """Measures the variants of some graphs, one graph after the other.

    Args:
        graphs: File by the name of the variant, float first, by the name of the graph; from
            :func:`mmdet3d_quant.check.variants.find_graphs`.
        engine: A key of ``ENGINES``.
        num_threads: CPU threads.
        runs: Rounds, in each of which every variant runs once.
        inputs: ``.npz`` with inputs by name, samples along a new first axis; by default random.
        num_samples: Random samples, without ``inputs``.
        memory: Whether to start processes that measure memory.
        nncf: Adds its variant of the float file.
        nncf_inputs: Inputs that NNCF calibrates on, ``.npz``; by default ``inputs``.
        listener: Receives the progress.

    Yields:
        Name of the graph, and its variants in the order of the files, NNCF's last.

    Raises:
        EngineError: If a file cannot be read, lacks an input, or NNCF fails.
        ValueError: If inputs do not fit, or the files are not of one graph.
    """
    listener = listener or Listener()
    stored = StoredInputs(inputs) if inputs else None
    calibration = StoredInputs(nncf_inputs) if nncf_inputs else None
    with tempfile.TemporaryDirectory() as folder:
        for name, variants in graphs.items():
            files = dict(variants)
            reference = next(iter(files.values()))
            shapes = make_engine(engine, reference, num_threads).input_shapes
            samples = stored.pick(shapes) if stored else generate_samples(shapes, num_samples)
            if nncf:
                listener.note(f'NNCF quantizes {name}')
                own = calibration.pick(shapes) if calibration else samples
                files[PEER] = Path(folder) / f'{Path(name).stem}.xml'
                nncf.quantize(reference, own, files[PEER])
            settings = (engine, num_threads, runs, memory, listener)
            yield name, _measure(name, files, samples, Path(folder), *settings)


def _measure(
    name: str,
    files: dict[str, Path],
    samples: Arrays,
    folder: Path,
    engine: str,
    num_threads: int,
    runs: int,
    memory: bool,
    listener: Listener,
) -> list[Variant]:
    """Measures the variants of one graph."""
    first = folder / 'first.npz'
    np.savez(first, **first_of(samples))

    def added(variant: str) -> float:
        return added_memory(engine, files[variant], first, num_threads)

    with listener.counting(name, runs) as counted:
        rounds = count(1)
        return compare(
            files,
            engine,
            num_threads,
            samples,
            runs,
            added if memory else None,
            lambda: counted(next(rounds)),
        )


def sum_up(results: Results) -> list[Variant]:
    """Adds all graphs in a row, by variant: times of equal rounds."""
    return [
        Variant(
            name=variants[0].name,
            seconds=[sum(seconds) for seconds in strict_zip(*(v.seconds for v in variants))],
            sqnr={},
            megabytes=sum(v.megabytes for v in variants),
            int8=_added([v.int8 for v in variants]),
            memory=None,
        )
        for variants in strict_zip(*results.values())
    ]


def _added(counts: list[tuple[int, int] | None]) -> tuple[int, int] | None:
    known = [c for c in counts if c]
    return (sum(c[0] for c in known), sum(c[1] for c in known)) if known else None


def benchmark_facts(results: Results, engine: str, num_threads: int) -> dict[str, Any]:
    """Puts all numbers into plain values that JSON takes.

    Returns:
        ``engine``, ``threads``, ``machine``, and ``graphs``: by name a list of variants.
    """
    return dict(
        engine=engine,
        threads=num_threads,
        machine=_machine(),
        graphs={
            name: [
                dict(
                    name=v.name,
                    milliseconds=[s * 1e3 for s in v.seconds],
                    faster_than_float=v.faster_than(variants[0]),
                    sqnr=finite_or_text(v.sqnr),
                    int8_convolutions=v.int8,
                    megabytes=v.megabytes,
                    memory_megabytes=v.memory,
                )
                for v in variants
            ]
            for name, variants in results.items()
        },
    )


def _machine() -> dict[str, Any]:
    """Describes the machine, with the versions of the engines."""
    machine: dict[str, Any] = dict(platform=platform.platform())
    for line in (
        Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else ()
    ):
        if line.startswith('model name'):
            machine['cpu'] = line.partition(':')[2].strip()
    for package in ('openvino', 'onnxruntime', 'tensorrt'):
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            continue
    return machine
