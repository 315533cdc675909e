"""Engines that run an exported graph: OpenVINO (true INT8 on CPU), ONNX Runtime (reference)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Protocol

import numpy as np

from mmdet3d_quant.compat import strict_zip
from mmdet3d_quant.export.engine_files import EngineError, check_inputs, reading
from mmdet3d_quant.export.openvino_graph import prepare
from mmdet3d_quant.export.trt import TensorRT

Arrays = Dict[str, np.ndarray]


class Engine(Protocol):
    """Runs a graph: named arrays in, named arrays out.

    Attributes:
        input_shapes: Shapes of the graph's inputs, by name; text where a size is open.
    """

    input_shapes: dict[str, tuple[Any, ...]]

    def __call__(self, inputs: Arrays) -> Arrays: ...


class OpenVINO:
    """OpenVINO on the CPU; runs Q/DQ graphs with INT8 kernels where the CPU has them.

    Args:
        path: ONNX file, or OpenVINO's own ``.xml``.
        num_threads: CPU threads.
        profiling: Count the time of every layer, for :meth:`profile`; runs take a bit longer.

    Raises:
        EngineError: If the file cannot be read or compiled.
    """

    def __init__(self, path: str | Path, num_threads: int = 2, profiling: bool = False):
        import openvino as ov

        core = ov.Core()
        with reading(path, 'OpenVINO'):
            model = core.read_model(str(path))
            if Path(path).suffix != '.xml':  # OpenVINO's own runs as it is
                prepare(model)
            self._compiled = core.compile_model(
                model,
                'CPU',
                {
                    'INFERENCE_NUM_THREADS': num_threads,
                    'PERFORMANCE_HINT': 'LATENCY',
                    'INFERENCE_PRECISION_HINT': 'f32',
                    'PERF_COUNT': profiling,
                },
            )
            self.input_shapes = {
                i.get_node().get_friendly_name(): tuple(
                    d.get_length() if d.is_static else str(d) for d in i.partial_shape
                )
                for i in self._compiled.inputs
            }

    def __call__(self, inputs: Arrays) -> Arrays:
        """Runs the graph once."""
        check_inputs(inputs, self.input_shapes)
        results = self._compiled(inputs)
        return {n: np.array(results[out]) for out in self._compiled.outputs for n in out.names}

    @property
    def input_names(self) -> list[str]:
        """Names of the graph's inputs."""
        return list(self.input_shapes)

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

    def profile(self, inputs: Arrays, runs: int = 10) -> list[LayerTime]:
        """Time of every layer that the engine made of the graph; needs ``profiling=True``.

        Args:
            inputs: By name.
            runs: The median of so many counts.
        """
        request = self._compiled.create_infer_request()
        counts: dict[str, list[float]] = {}
        kinds = {}
        for _ in range(runs):
            request.infer(inputs)
            for layer in request.profiling_info:
                counts.setdefault(layer.node_name, []).append(layer.real_time.total_seconds())
                kinds[layer.node_name] = layer.node_type, layer.exec_type
        return [
            LayerTime(name, *kinds[name], float(np.median(seconds)))
            for name, seconds in counts.items()
        ]


@dataclass(frozen=True)
class LayerTime:
    """How long one layer of an engine takes.

    Attributes:
        name: As the engine calls it.
        kind: Type of the operation.
        kernel: Implementation and precision.
        seconds: Median time of a run.
    """

    name: str
    kind: str
    kernel: str
    seconds: float


class ONNXRuntime:
    """ONNX Runtime on the CPU, without graph optimisations: the arithmetic as written.

    Args:
        path: ONNX file.
        num_threads: CPU threads.

    Raises:
        EngineError: If the file cannot be read.
    """

    def __init__(self, path: str | Path, num_threads: int = 2):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        with reading(path, 'ONNX Runtime'):
            self._session = ort.InferenceSession(
                str(path), options, providers=['CPUExecutionProvider']
            )
        self.input_shapes = {i.name: tuple(i.shape) for i in self._session.get_inputs()}

    def __call__(self, inputs: Arrays) -> Arrays:
        """Runs the graph once."""
        check_inputs(inputs, self.input_shapes)
        names = [out.name for out in self._session.get_outputs()]
        return dict(strict_zip(names, self._session.run(names, inputs)))


#: Engines by the name that the tools take.
ENGINES: dict[str, type] = {
    'openvino': OpenVINO,
    'onnxruntime': ONNXRuntime,
    'tensorrt': TensorRT,
}


def make_engine(name: str, path: str | Path, num_threads: int = 2) -> Engine:
    """An engine by name.

    Args:
        name: A key of :data:`ENGINES`.
        path: File to run.
        num_threads: CPU threads.

    Raises:
        EngineError: If the name is unknown, the engine is not installed, or the file cannot be
            read.
    """
    if name not in ENGINES:
        raise EngineError(f'there is no engine {name!r}; there are {", ".join(ENGINES)}')
    return ENGINES[name](path, num_threads)


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
