"""Table of the engines that run exported graphs; a new one is a file here and a line in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from mmdet3d_quant.engines.engine import Arrays, Engine, latency, race
from mmdet3d_quant.engines.files import EngineError
from mmdet3d_quant.engines.onnxruntime import ONNXRuntime
from mmdet3d_quant.engines.openvino import OpenVINO
from mmdet3d_quant.engines.tensorrt import TensorRT
from mmdet3d_quant.engines.tensorrt_rtx import TensorRTRTX

__all__ = [
    'ENGINES',
    'Arrays',
    'Engine',
    'EngineError',
    'ONNXRuntime',
    'OpenVINO',
    'TensorRT',
    'TensorRTRTX',
    'latency',
    'make_engine',
    'race',
]

#: Engines by the name that the tools take.
ENGINES: dict[str, Callable[..., Engine]] = {
    'openvino': OpenVINO,
    'onnxruntime': ONNXRuntime,
    'onnxruntime:default': partial(ONNXRuntime, optimized=True),
    'tensorrt': TensorRT,
    'tensorrt-rtx': TensorRTRTX,
}


def make_engine(name: str, path: str | Path, num_threads: int = 2) -> Engine:
    """Creates an engine by name.

    Args:
        name: A key of :data:`ENGINES`.
        path: File to run.
        num_threads: CPU threads.

    Returns:
        Engine with the file loaded.

    Raises:
        EngineError: If the name is unknown, the engine is not installed, or the file cannot be
            read.
    """
    if name not in ENGINES:
        raise EngineError(f'there is no engine {name!r}; there are {", ".join(ENGINES)}')
    return ENGINES[name](path, num_threads)
