"""Engines that run an exported graph: OpenVINO (true INT8 on CPU), ONNX Runtime (reference)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

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

        core = ov.Core()
        model = core.read_model(str(path))
        _join_activation_qdq(model)
        self._compiled = core.compile_model(
            model,
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

    @property
    def input_names(self) -> list[str]:
        """Names of the graph's inputs."""
        return [i.get_any_name() for i in self._compiled.inputs]

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


def _join_activation_qdq(model: Any) -> None:
    """Makes each activation's Q/DQ pair one FakeQuantize of equal meaning, in place.

    OpenVINO reads QuantizeLinear as a FakeQuantize onto integers, followed by the steps that
    DequantizeLinear undoes. Its INT8 concat takes the integers' range for the real one and
    rounds to steps of about 2.0 (seen in 2024.6 to 2026.4: 10 dB instead of 130 dB). One
    FakeQuantize from reals to reals does not lead it there, and costs nothing.
    """
    from openvino import opset13

    for multiply in model.get_ops():
        if multiply.get_type_name() != 'Multiply':
            continue
        node = _source(multiply)
        while node is not None and node.get_type_name() in ('Subtract', 'Convert'):
            node = _source(node)
        if node is None or node.get_type_name() != 'FakeQuantize':
            continue
        data, low, high = (node.input(i).get_source_output() for i in range(3))
        if data.get_node().get_type_name() == 'Constant':
            continue  # a weight
        joined = opset13.fake_quantize(data, low, high, low, high, node.get_attributes()['levels'])
        joined.set_friendly_name(multiply.get_friendly_name())
        for reader in multiply.output(0).get_target_inputs():
            reader.replace_source_output(joined.output(0))
    model.validate_nodes_and_infer_types()


def _source(node: Any) -> Any:
    """The node that makes the first input, or None where there is no input."""
    return node.input(0).get_source_output().get_node() if node.inputs() else None


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
