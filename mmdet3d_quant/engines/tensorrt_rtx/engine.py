"""TensorRT for RTX as an engine like the others."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from mmdet3d_quant.engines.files import EngineError, reading
from mmdet3d_quant.engines.tensorrt import TensorRT
from mmdet3d_quant.engines.tensorrt_rtx.compiler import SMS, check_installed, compile_onnx

#: GPU generations that run engines.
RUNS_ON = SMS[1:]


class TensorRTRTX(TensorRT):
    """TensorRT for RTX on an NVIDIA GPU of compute capability 8.0, 8.6, 8.9 or 12.x.

    Layers run in the types that the file says: INT8 between Q/DQ, float elsewhere.

    Args:
        path: ONNX file; it is compiled for the GPU that is here.
        num_threads: Not used; engines of one table take the same arguments.

    Raises:
        EngineError: If TensorRT for RTX or such a GPU is missing, or the compiler refuses the file.
    """

    def __init__(self, path: str | Path, num_threads: int = 2):
        check_installed()
        here = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        sm = 'none' if here is None else f'SM{here[0]}{here[1]}'
        if sm not in RUNS_ON:
            raise EngineError(
                'TensorRT for RTX needs an RTX GPU (compute capability 8.0, 8.6, 8.9 or 12.x; here '
                f'is {sm}): it compiles here, as `tools/lint_onnx.py --compile` does, and does not '
                'run; take openvino or onnxruntime'
            )
        import tensorrt_rtx_bindings as trt

        with reading(path, 'TensorRT for RTX'), tempfile.TemporaryDirectory() as folder:
            plan = Path(folder) / 'engine'
            self.compiled = compile_onnx(path, [sm], plan=plan)[sm]
            if not self.compiled.accepted:
                raise ValueError(self.compiled.error)
            self._load(trt, trt.Logger(trt.Logger.WARNING), plan.read_bytes())

    def int8_convolutions(self) -> tuple[int, int]:
        """Counts convolutions that run in INT8, and all, by the compiler's log."""
        types = [p.runs_in for p in self.compiled.products if p.op.startswith('Conv')]
        return types.count('Int8'), len(types)
