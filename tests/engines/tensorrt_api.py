"""The part of TensorRT's Python API that an engine wants, strict, run by ONNX Runtime on a CPU.

As in TensorRT 8.6 to 10: a name, a flag or an argument that is not there raises; what TensorRT
logs and answers with None or False, out of order or incomplete, is None or False here.
"""

import ctypes
import enum
import weakref

import numpy as np
import onnx
import onnxruntime

PREFIX = b'plan of this version and GPU:'


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(enum.IntEnum):
    FP16 = 0
    INT8 = 1
    TF32 = 7


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class DataType(enum.Enum):
    FLOAT = np.float32
    INT32 = np.int32


def nptype(trt_type):
    _want(trt_type, DataType)
    return trt_type.value


def _want(value, kind):
    """As pybind11, which converts nothing."""
    if type(value) is not kind:
        raise TypeError(f'incompatible function arguments: {value!r} is no {kind.__name__}')


class Logger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self, min_severity=WARNING):
        _want(min_severity, int)


class _Network:
    """Empty until a parser has filled it."""

    def __init__(self, explicit):
        self.explicit, self.model = explicit, None


class _Config:
    def __init__(self):
        self.flags = set()

    def set_flag(self, flag):
        _want(flag, BuilderFlag)
        self.flags.add(flag)


class Builder:
    def __init__(self, logger):
        _want(logger, Logger)

    def create_network(self, flags=0):
        _want(flags, int)
        if flags & ~sum(1 << flag for flag in NetworkDefinitionCreationFlag):
            raise ValueError(f'unknown network flags {flags}')
        return _Network(bool(flags & 1 << NetworkDefinitionCreationFlag.EXPLICIT_BATCH))

    def create_builder_config(self):
        return _Config()

    def build_serialized_network(self, network, config):
        _want(network, _Network)
        _want(config, _Config)
        if network.model is None:
            return None  # no outputs
        kinds = {node.op_type for node in network.model.graph.node}
        if 'QuantizeLinear' in kinds and BuilderFlag.INT8 not in config.flags:
            return None  # INT8 was not configured, and layers want it
        flags = ','.join(sorted(flag.name for flag in config.flags)).encode()
        return memoryview(PREFIX + flags + b':' + network.model.SerializeToString())


class _ParserError:
    def __init__(self, text):
        self._text = text

    def desc(self):
        return self._text


class OnnxParser:
    def __init__(self, network, logger):
        _want(network, _Network)
        _want(logger, Logger)
        self._network, self._errors = network, []

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return _ParserError(self._errors[index])

    def parse_from_file(self, model):
        _want(model, str)
        if not self._network.explicit:
            self._errors.append('this network has an implicit batch')
            return False
        parsed = onnx.load(model)
        known = {'', 'ai.onnx'}
        self._errors += [f'no {n.op_type}' for n in parsed.graph.node if n.domain not in known]
        if not self._errors:
            self._network.model = parsed
        return not self._errors


class Runtime:
    def __init__(self, logger):
        _want(logger, Logger)

    def deserialize_cuda_engine(self, serialized_engine):
        _want(serialized_engine, bytes)
        if not serialized_engine.startswith(PREFIX):
            return None
        return _Engine(self, serialized_engine[len(PREFIX) :].partition(b':')[2])


class _Engine:
    def __init__(self, runtime, graph):
        self._runtime = weakref.ref(runtime)
        self._session = onnxruntime.InferenceSession(graph, providers=['CPUExecutionProvider'])
        self._inputs = {tensor.name: tensor for tensor in self._session.get_inputs()}
        outputs = {tensor.name: tensor for tensor in self._session.get_outputs()}
        self._tensors = {**outputs, **self._inputs}  # in no order that a caller may count on

    @property
    def num_io_tensors(self):
        return len(self._tensors)

    def get_tensor_name(self, index):
        _want(index, int)
        return list(self._tensors)[index]

    def get_tensor_mode(self, name):
        self._tensors[name]
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name):
        return list(self._tensors[name].shape)  # like its Dims, no tuple

    def get_tensor_dtype(self, name):
        return {'tensor(float)': DataType.FLOAT, 'tensor(int32)': DataType.INT32}[
            self._tensors[name].type
        ]

    def create_execution_context(self):
        return _Context(self)


class _Context:
    def __init__(self, engine):
        self._engine, self._addresses = engine, {}

    def set_tensor_address(self, name, memory):
        _want(memory, int)
        if name not in self._engine._tensors:
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        _want(stream_handle, int)
        engine = self._engine
        if engine._runtime() is None:
            raise RuntimeError('the runtime is gone, and its engine with it')
        if self._addresses.keys() != engine._tensors.keys():
            return False
        results = engine._session.run(None, {name: self._at(name) for name in engine._inputs})
        for tensor, result in zip(engine._session.get_outputs(), results):
            self._at(tensor.name)[...] = result
        return True

    def _at(self, name):
        """The array at the address of a tensor."""
        dtype = np.dtype(self._engine.get_tensor_dtype(name).value)
        shape = self._engine.get_tensor_shape(name)
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(
            (ctypes.c_char * size).from_address(self._addresses[name]), dtype
        ).reshape(shape)
