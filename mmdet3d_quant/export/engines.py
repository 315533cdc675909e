"""Engines that run an exported graph: OpenVINO (true INT8 on CPU), ONNX Runtime (reference)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

import numpy as np

Arrays = dict[str, np.ndarray]


class Engine(Protocol):
    """Runs a graph: named arrays in, named arrays out."""

    def __call__(self, inputs: Arrays) -> Arrays: ...


class OpenVINO:
    """OpenVINO on the CPU; runs Q/DQ graphs with INT8 kernels where the CPU has them.

    Args:
        path: ONNX file.
        num_threads: CPU threads.
    """

    def __init__(self, path: str | Path, num_threads: int = 2):
        import openvino as ov

        self._compiled = ov.Core().compile_model(
            str(path),
            'CPU',
            {
                'INFERENCE_NUM_THREADS': num_threads,
                'PERFORMANCE_HINT': 'LATENCY',
                'INFERENCE_PRECISION_HINT': 'f32',
            },
        )

    def __call__(self, inputs: Arrays) -> Arrays:
        """Runs the graph once."""
        results = self._compiled(inputs)
        return {n: np.array(results[out]) for out in self._compiled.outputs for n in out.names}

    def int8_convolutions(self) -> tuple[int, int]:
        """Convolutions that the engine runs in INT8, and all of them."""
        precisions = []
        for op in self._compiled.get_runtime_model().get_ops():
            info = op.get_rt_info()
            if 'layerType' in info and info['layerType'].astype(str) in (
                'Convolution',
                'Deconvolution',
            ):
                precisions.append(info['runtimePrecision'].astype(str))
        return sum(p in ('i8', 'u8') for p in precisions), len(precisions)


class ONNXRuntime:
    """ONNX Runtime on the CPU, without graph optimisations: the arithmetic as written.

    Args:
        path: ONNX file.
        num_threads: CPU threads.
    """

    def __init__(self, path: str | Path, num_threads: int = 2):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])

    def __call__(self, inputs: Arrays) -> Arrays:
        """Runs the graph once."""
        names = [out.name for out in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, inputs), strict=True))


def latency(engine: Engine, inputs: Arrays, runs: int = 10) -> float:
    """Median seconds of a run, after one to warm up."""
    engine(inputs)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        engine(inputs)
        times.append(time.perf_counter() - start)
    return float(np.median(times))
