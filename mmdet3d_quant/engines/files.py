"""Checks and error messages for the files and inputs of engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmdet3d_quant.files.limits import LARGEST

#: ONNX's numbers of float32, float16, float64 and bfloat16.
_FLOATS = (1, 10, 11, 16)
#: Operators between a stored tensor and its layer.
_ON_THE_WAY = ('QuantizeLinear', 'DequantizeLinear', 'Identity', 'Cast', 'Transpose')


class EngineError(ValueError):
    """A file cannot be run: it is missing, damaged or foreign, or the engine is not installed."""


@contextmanager
def reading(path: str | Path, engine: str) -> Iterator[None]:
    """Converts any exception of an engine that loads a file to an error with file and cause.

    Args:
        path: The file.
        engine: Name of the engine, for the message.

    Raises:
        EngineError: If the file does not exist, is too large for ONNX, has numbers that are not
            finite, or the block raises.
    """
    path = Path(path)
    if not path.is_file():
        raise EngineError(f'{path} does not exist; make it with tools/export_onnx.py')
    size = path.stat().st_size
    if path.suffix == '.onnx' and size >= LARGEST:
        raise EngineError(
            f'{path} has {size / 2**30:.1f} GiB, and ONNX files end at 2 GiB: it is no ONNX file, '
            'or was not written whole'
        )
    try:
        if path.suffix == '.onnx':
            _check_finite(path)
        yield
    except Exception as err:  # every engine has classes of its own
        raise EngineError(f'{engine} cannot run {path}: {_diagnosis(path, err)}') from err


def _diagnosis(path: Path, err: Exception) -> str:
    """Finds the cause of a loading error: a defect of the file, else the engine's message."""
    if path.suffix != '.onnx':
        return _line(err)
    import onnx
    from google.protobuf.message import DecodeError

    if path.stat().st_size == 0:
        return 'it is empty'
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        return 'it is truncated, or no ONNX file'
    if not model.graph.node or not model.opset_import:
        return 'it is no ONNX file, or holds no graph'
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as missing:  # onnx has several classes for it
        return f'the file with its weights is missing or damaged: {_line(missing)}'
    return _line(err)


#: Readers for which infinity is a limit or a mask, and no damage.
_MASKED = ('Clip', 'Expand', 'Max', 'Min', 'Pad', 'Where')


def _check_finite(path: Path) -> None:
    """Checks the stored numbers of an ONNX file; engines round NaN to 0 and go on.

    Raises:
        ValueError: If a tensor has NaN, or infinity other than as a limit or a mask; names the
            tensor and the layer that reads it.
    """
    import onnx

    graph = onnx.load(str(path)).graph
    readers = {i: node for node in reversed(graph.node) for i in node.input}
    stored = {i.name: i for i in graph.initializer}
    stored.update(
        (n.output[0], n.attribute[0].t)
        for n in graph.node
        if n.op_type == 'Constant' and n.attribute[0].name == 'value'
    )
    for name, tensor in stored.items():
        if name not in readers or tensor.data_type not in _FLOATS:
            continue
        value, layer = onnx.numpy_helper.to_array(tensor).astype(np.float64), readers[name]
        wrong = value[~np.isfinite(value)]
        masks = layer.op_type in _MASKED or layer.op_type == 'Add' and not np.any(wrong > 0)
        if wrong.size and (np.isnan(wrong).any() or not masks):
            while layer.op_type in _ON_THE_WAY and layer.output[0] in readers:
                layer = readers[layer.output[0]]
            raise ValueError(
                f'{wrong.size} of the {value.size} numbers of tensor {name!r}, which layer '
                f'{layer.name or layer.output[0]!r} ({layer.op_type}) reads, are NaN or infinite: '
                'mend the checkpoint, and export again'
            )


def _line(err: Exception) -> str:
    """Shortens a message to one line, without OpenVINO's leading source locations and title."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(('Exception from', 'Check '))]
    told = told or lines or [type(err).__name__]
    return ' '.join(told if told[0].endswith(':') else told[:1])[:400]


def check_inputs(inputs: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[Any, ...]]) -> None:
    """Checks names and shapes of the inputs of a graph.

    Args:
        inputs: Arrays by name.
        shapes: Shapes of the graph's inputs, by name; text where a size is open.

    Raises:
        ValueError: If an input is missing or has another shape.
    """
    for name, shape in shapes.items():
        if name not in inputs:
            raise ValueError(f'input {name!r} is missing; the graph takes {", ".join(shapes)}')
        fixed = zip(inputs[name].shape, shape)
        if len(inputs[name].shape) != len(shape) or any(
            isinstance(there, int) and here != there for here, there in fixed
        ):
            raise ValueError(
                f'input {name!r} has shape {inputs[name].shape}, the graph wants {shape}: '
                'graphs are exported for one size'
            )
