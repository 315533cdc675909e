"""TensorRT as an engine like the others; its Python package is only needed when it runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdet3d_quant.engines.files import EngineError, check_inputs, reading
from mmdet3d_quant.files.outputs import whole
from mmdet3d_quant.files.typed import is_strong


class TensorRT:
    """TensorRT 8.6 to 11 on an NVIDIA GPU, INT8 where the graph has Q/DQ and FP16 elsewhere.

    Versions from 11 on, and files that are strongly typed, have the types that the file says.

    Args:
        path: ONNX file to build from, or a ``.plan`` that was built on a machine of this kind.
        num_threads: Not used; engines of one table take the same arguments.
        save_plan: Where to keep the built engine.

    Raises:
        EngineError: If TensorRT or a GPU is missing, or the file cannot be parsed or built.
    """

    def __init__(self, path: str | Path, num_threads: int = 2, save_plan: str | Path | None = None):
        try:
            import tensorrt as trt
        except ImportError as err:
            raise EngineError(
                f'TensorRT is not installed here ({err}): `pip install tensorrt` where there is an '
                'NVIDIA GPU (on an Orin it comes with JetPack), or take openvino or onnxruntime'
            ) from None
        if not torch.cuda.is_available():
            raise EngineError('TensorRT needs an NVIDIA GPU, and torch sees none here')
        logger = trt.Logger(trt.Logger.WARNING)
        with reading(path, 'TensorRT'):
            plan = Path(path).read_bytes() if Path(path).suffix == '.plan' else _build(path, logger)
            self._load(trt, logger, plan)
        if save_plan is not None:
            with whole(save_plan) as part:
                part.write_bytes(plan)

    def _load(self, trt: Any, logger: Any, plan: bytes) -> None:
        """Loads a plan, and binds a buffer to each of its inputs and outputs.

        Args:
            trt: TensorRT's module.
            logger: Its logger.
            plan: Serialized engine.

        Raises:
            ValueError: If the plan is for another version or GPU.
        """
        self._runtime = trt.Runtime(logger)  # must outlive its engines
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ValueError('the plan was built by another version or for another GPU')
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {n: self._engine.get_tensor_mode(n) for n in names}
        shapes = {n: tuple(self._engine.get_tensor_shape(n)) for n in names}
        dtypes = {n: np.dtype(trt.nptype(self._engine.get_tensor_dtype(n))) for n in names}
        self._buffers = {}
        for n in names:
            dtype = torch.from_numpy(np.empty(0, dtypes[n])).dtype
            self._buffers[n] = torch.empty(shapes[n], dtype=dtype, device='cuda')
            self._context.set_tensor_address(n, self._buffers[n].data_ptr())
        self.input_shapes = {n: shapes[n] for n in names if modes[n] == trt.TensorIOMode.INPUT}

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph once, copies to and from the GPU included."""
        check_inputs(inputs, self.input_shapes)
        for name in self.input_shapes:
            self._buffers[name].copy_(torch.from_numpy(np.ascontiguousarray(inputs[name])))
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise EngineError('TensorRT could not run the engine; its log above says why')
        outputs = [n for n in self._buffers if n not in self.input_shapes]
        return {n: self._buffers[n].cpu().numpy() for n in outputs}

    def int8_convolutions(self) -> tuple[int, int] | None:
        """Returns None: not implemented; ``trtexec --exportLayerInfo`` reports it."""
        return None


def _build(path: str | Path, logger: Any) -> bytes:
    """Builds a serialized engine from an ONNX file."""
    import tensorrt as trt

    strong = is_strong(path)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt, strong))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise ValueError('; '.join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    for name in () if strong else WEAK_FLAGS:
        if hasattr(trt.BuilderFlag, name):
            config.set_flag(getattr(trt.BuilderFlag, name))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError('the engine could not be built; the log above says why')
    return bytes(plan)


#: Flags that let a builder choose these types; INT8 is refused without.
WEAK_FLAGS = ('FP16', 'INT8')


def _network_flags(trt: Any, strong: bool) -> int:
    """Computes the flags of a network, which differ by version.

    Args:
        trt: TensorRT's module.
        strong: Whether the file is strongly typed.

    Returns:
        Int, a bit per flag.

    Raises:
        ValueError: If a file is strongly typed and the version is not.
    """
    known = trt.NetworkDefinitionCreationFlag
    names = ['EXPLICIT_BATCH']  # the only kind since TensorRT 10
    weak = [name for name in WEAK_FLAGS if hasattr(trt.BuilderFlag, name)]
    if strong:
        if weak and not hasattr(known, 'STRONGLY_TYPED'):
            raise ValueError(
                f'the file is strongly typed, and TensorRT {trt.__version__} misreads its FP16 '
                'scales: export with --target tensorrt8'
            )
        names.append('STRONGLY_TYPED')
    elif not weak:
        warnings.warn(
            f'TensorRT {trt.__version__} runs float32 as float32, and this file is not typed: '
            'export with --target tensorrt11 for FP16',
            stacklevel=2,
        )
    return sum(1 << int(getattr(known, name)) for name in names if hasattr(known, name))
