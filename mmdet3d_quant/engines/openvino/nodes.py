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


def source(node: Any) -> Any:
    """Producer of a node's first input; None for a node without inputs."""
    return node.input(0).get_source_output().get_node() if node.inputs() else None


def _readers(node: Any) -> Any:
    return node.output(0).get_target_inputs()


def replace(node: Any, other: Any) -> None:
    """Redirects all readers of a node's output to another node; results keep their names."""
    names = node.output(0).get_names()
    if any(reader.get_node().get_type_name() == 'Result' for reader in _readers(node)):
        node.output(0).set_names(set())  # OpenVINO before 2025 does not carry them along
        other.output(0).add_names(names)
    for reader in _readers(node):
        reader.replace_source_output(other.output(0))


def is_constant(output: Any) -> bool:
    """True if the tensor is constant (no Parameter upstream)."""
    waiting, seen = [output.get_node()], set()
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == 'Parameter':
            return False
        if node.get_friendly_name() not in seen:
            seen.add(node.get_friendly_name())
            waiting += [i.get_source_output().get_node() for i in node.inputs()]
    return True


def value(output: Any) -> np.ndarray:
    """Value of a constant tensor, by compiling and running its subgraph."""
    import openvino as ov

    return ov.compile_model(ov.Model([output], []), 'CPU')([])[0]


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
