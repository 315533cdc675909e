"""OpenVINO as an engine: true INT8 on a CPU."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines.engine import Arrays
from mmdet3d_quant.engines.files import check_inputs, reading
from mmdet3d_quant.engines.openvino.deformable import rules
from mmdet3d_quant.engines.openvino.graph import prepare
from mmdet3d_quant.files.typed import is_strong, to_float32


class OpenVINO:
    """OpenVINO on the CPU; runs Q/DQ graphs with INT8 kernels where the CPU has them.

    FP16 tensors are computed in float32.

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
        for rule in rules():
            core.add_extension(rule)
        with reading(path, 'OpenVINO'):
            model = _read(core, path)
            # Two outputs that become one tensor would lose a name.
            self._names = [output.get_names() for output in model.outputs]
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
        named = strict_zip(self._compiled.outputs, self._names)
        return {n: np.array(results[out]) for out, names in named for n in names}

    @property
    def input_names(self) -> list[str]:
        """Names of the graph's inputs."""
        return list(self.input_shapes)

    def int8_convolutions(self) -> tuple[int, int]:
        """Counts the convolutions of the compiled graph: those in INT8, and all."""
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
        """Measures the time of every layer of the compiled graph; needs ``profiling=True``.

        Args:
            inputs: Arrays by name.
            runs: Number of runs, of which the median is taken.

        Returns:
            List of :class:`LayerTime`, one per layer.
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


def _read(core: Any, path: str | Path) -> Any:
    """Reads a model; one that is strongly typed as float32, which the transformations want."""
    if Path(path).suffix == '.xml' or not is_strong(path):
        return core.read_model(str(path))
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / 'float32.onnx'
        plain.write_bytes(to_float32(onnx.load(str(path))).SerializeToString())
        return core.read_model(str(plain))


@dataclass(frozen=True)
class LayerTime:
    """Run time of one layer of a compiled graph.

    Attributes:
        name: Name of the layer in the compiled graph.
        kind: Type of the operation.
        kernel: Implementation and precision.
        seconds: Median time of a run.
    """

    name: str
    kind: str
    kernel: str
    seconds: float
