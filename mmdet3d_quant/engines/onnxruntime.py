"""ONNX Runtime as an engine: the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines.deformable import to_onnx_names
from mmdet3d_quant.engines.engine import Arrays
from mmdet3d_quant.engines.files import check_inputs, reading
from mmdet3d_quant.engines.plugins import plugin_nodes
from mmdet3d_quant.engines.plugins.split import SplitGraph
from mmdet3d_quant.files.typed import emulated, is_strong


class ONNXRuntime:
    """ONNX Runtime on the CPU, without graph optimisations: the arithmetic as written.

    Of a strongly typed file, every FP16 tensor is rounded to it (``files/typed.py``). Nodes of
    Autoware's and OpenVINO's plugins run in numpy (``engines/plugins``).

    Args:
        path: ONNX file.
        num_threads: CPU threads.
        optimized: Optimise the graph as ONNX Runtime does by default: INT8 kernels where it has
            them, whose INT32 biases and fused products differ from the arithmetic as written, and
            no rounding to FP16 between kernels that it has in float32 only.

    Raises:
        EngineError: If the file cannot be read.
    """

    def __init__(self, path: str | Path, num_threads: int = 2, optimized: bool = False):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        with reading(path, 'ONNX Runtime'):
            self._session = _session(
                path, optimized, partial(ort.InferenceSession, sess_options=options, providers=CPU)
            )
        self.input_shapes = {i.name: tuple(i.shape) for i in self._session.get_inputs()}
        halves = [i.name for i in self._session.get_inputs() if i.type == 'tensor(float16)']
        self._dtypes = dict.fromkeys(halves, np.float16)

    def __call__(self, inputs: Arrays) -> Arrays:
        """Runs the graph once.

        Raises:
            EngineError: If the arrays do not fit a plugin's node; names it.
        """
        check_inputs(inputs, self.input_shapes)
        names = [out.name for out in self._session.get_outputs()]
        inputs = {n: a.astype(self._dtypes.get(n, a.dtype), copy=False) for n, a in inputs.items()}
        return dict(strict_zip(names, self._session.run(names, inputs)))

    def int8_convolutions(self) -> None:
        """Returns None: ONNX Runtime does not report it."""


#: Where sessions run.
CPU = ['CPUExecutionProvider']
#: The first version with a kernel for deformable convolutions on a CPU.
_DEFORMABLE = (1, 25)


def has_deformable() -> bool:
    """Tells whether the ONNX Runtime here runs deformable convolutions."""
    from onnxruntime import __version__

    return tuple(map(int, __version__.split('.')[:2])) >= _DEFORMABLE


def _session(path: str | Path, optimized: bool, make: Callable[[str | bytes], Any]) -> Any:
    """Makes a session of a file as it is, of the graph that ONNX Runtime knows, or of its parts."""
    loaded = onnx.load(str(path))
    known = to_onnx_names(loaded)
    if known is not loaded and not has_deformable():
        raise ValueError(
            f'it has deformable convolutions, which ONNX Runtime runs from {_DEFORMABLE[0]}.'
            f'{_DEFORMABLE[1]} on; a newer one may want a newer Python: or take the engine openvino'
        )
    rounded = not optimized and is_strong(loaded)
    plugins = plugin_nodes(known)
    if plugins:
        return SplitGraph(known, plugins, make, rounded)
    if rounded:
        known = emulated(known)
    return make(str(path) if known is loaded else known.SerializeToString())
