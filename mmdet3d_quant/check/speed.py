"""Float and INT8 files of a set in OpenVINO, as the report takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmdet3d_quant.engines import OpenVINO, latency
from mmdet3d_quant.export.deploy import engine_files

RUNS, THREADS = 30, 2


def measure_speed(inputs: dict[str, torch.Tensor], folders: dict[str, Path]) -> dict[str, Any]:
    """Measures the speed of the files.

    Args:
        inputs: By the names that the files give them.
        folders: ``float`` and ``int8``, with files of the same names.

    Returns:
        ``latency`` (seconds per file and precision), ``engine`` (how they were measured) and
        ``int8_convolutions`` (those that run in INT8, and all, per file).
    """
    times: dict[str, dict[str, float]] = {}
    convolutions = {}
    for path in engine_files(folders['int8']):
        times[path.name] = {}
        for name, folder in folders.items():
            engine = OpenVINO(folder / path.name, THREADS)
            arrays = {n: inputs[n].numpy() for n in engine.input_names}
            times[path.name][name] = latency(engine, arrays, RUNS)
            if name == 'int8':
                convolutions[path.name] = engine.int8_convolutions()
    told = f'OpenVINO, {THREADS} threads, median of {RUNS} runs'
    return dict(latency=times, engine=told, int8_convolutions=convolutions)


def file_sizes(folders: dict[str, Path]) -> dict[str, dict[str, int]]:
    """Reads the sizes of the files.

    Args:
        folders: ``float`` and ``int8``, with files of the same names.

    Returns:
        Bytes per file and precision.
    """
    return {
        path.name: {name: (f / path.name).stat().st_size for name, f in folders.items()}
        for path in engine_files(folders['int8'])
    }
