"""TensorRT for RTX: NVIDIA's compiler, which needs no GPU, and an engine, which needs one."""

from __future__ import annotations

from mmdet3d_quant.engines.tensorrt_rtx.compiler import SMS, compile_onnx, is_installed
from mmdet3d_quant.engines.tensorrt_rtx.engine import TensorRTRTX
from mmdet3d_quant.engines.tensorrt_rtx.record import Compiled

__all__ = ['SMS', 'Compiled', 'TensorRTRTX', 'compile_onnx', 'is_installed']
