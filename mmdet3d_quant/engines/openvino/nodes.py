"""Queries, creation and replacement of nodes in an ``openvino.Model``.

A rounder is the FakeQuantize of an activation; see :func:`is_rounder`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def operators() -> Any:
    """Imports OpenVINO's ``opset13``, which OpenVINO 2024 and before have in another module."""
    try:
        from openvino import opset13
    except ImportError:
        from openvino.runtime import opset13
    return opset13


def identity(node: Any) -> str:
    """Name that no other node has; friendly names can be shared, and ``==`` makes a node."""
    return node.get_name()


def source(node: Any) -> Any:
    """Producer of a node's first input; None for a node without inputs."""
    return node.input(0).get_source_output().get_node() if node.inputs() else None


def replace(node: Any, other: Any) -> None:
    """Redirects all readers of a node's output to another node; names do not move along."""
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(other.output(0))


def is_constant(output: Any) -> bool:
    """True if the tensor is constant (no Parameter upstream)."""
    waiting, seen = [output.get_node()], set()
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == 'Parameter':
            return False
        if identity(node) not in seen:
            seen.add(identity(node))
            waiting += [i.get_source_output().get_node() for i in node.inputs()]
    return True


def value(output: Any) -> np.ndarray:
    """Value of a constant tensor, by compiling and running its subgraph."""
    import openvino as ov

    return ov.compile_model(ov.Model([output], []), 'CPU')([])[0]


#: Operators that OpenVINO runs on the integers of a rounded tensor.
_KEEPING = (
    'AvgPool', 'Clamp', 'Concat', 'Interpolate', 'MaxPool', 'Pad', 'Relu', 'Reshape', 'Slice',
    'Split', 'Squeeze', 'StridedSlice', 'Transpose', 'Unsqueeze', 'VariadicSplit',
)  # yapf: disable  # fmt: skip


def data_inputs(node: Any) -> Any:
    """Inputs of an operator that keeps integers, without sizes and axes."""
    if node.get_type_name() not in _KEEPING or _overshoots(node):
        return []
    return node.inputs() if node.get_type_name() == 'Concat' else node.inputs()[:1]


def _overshoots(node: Any) -> bool:
    """True for a resize whose results can lie beyond the values that it reads."""
    if node.get_type_name() != 'Interpolate':
        return False
    return node.get_attributes()['mode'] in ('cubic', 'bicubic_pillow')


def rounders_before(node: Any) -> Iterator[Any]:
    """Yields the rounders whose integers a node holds: itself, or through operators before it."""
    return filter(is_rounder, makers_before(node))


def makers_before(node: Any) -> Iterator[Any]:
    """Yields the nodes whose values a node holds, past operators that keep integers."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if identity(node) in seen:
            continue
        seen.add(identity(node))
        before = [] if is_rounder(node) else data_inputs(node)
        waiting += [i.get_source_output().get_node() for i in before]
        if not before:
            yield node


def rounders(model: Any) -> Iterator[Any]:
    """All activation FakeQuantize nodes in topological order."""
    return filter(is_rounder, model.get_ordered_ops())


def is_rounder(node: Any) -> bool:
    """True if a node is a per-tensor FakeQuantize of an activation with 256 levels."""
    return (
        node.get_type_name() == 'FakeQuantize'
        and node.get_attributes()['levels'] == 256
        and source(node).get_type_name() != 'Constant'
        and all(single(node, i) is not None for i in range(1, 5))
        and single(node, 1) == single(node, 3)
        and single(node, 2) == single(node, 4)
    )


def range_of(node: Any) -> tuple[float, float]:
    """Least and largest output value of a rounder."""
    low, high = single(node, 1), single(node, 2)
    assert low is not None and high is not None
    return low, high


def single(node: Any, index: int) -> float | None:
    """Value of a scalar constant input; None if it is computed or has several elements."""
    constant = node.input(index).get_source_output().get_node()
    while constant.get_type_name() == 'Convert':
        constant = source(constant)
    if constant.get_type_name() != 'Constant' or constant.data.size != 1:
        return None
    return float(constant.data.reshape(()))


def make_rounder(data: Any, low: float, high: float, like: Any) -> Any:
    """Creates a per-tensor FakeQuantize with 256 levels.

    Args:
        data: Output to quantize.
        low: Least value of the grid.
        high: Largest value of the grid.
        like: Node whose name the new one takes.
    """
    opset13 = operators()

    ends = np.float32(low), np.float32(high)
    made = opset13.fake_quantize(data, *ends, *ends, 256)
    made.set_friendly_name(like.get_friendly_name())
    return made
