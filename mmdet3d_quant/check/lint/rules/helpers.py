"""Queries of a graph that rules of several groups share."""

from __future__ import annotations

from typing import Iterator

import numpy as np

from mmdet3d_quant.check.lint.graph import Graph, Pair


def all_pairs(graph: Graph) -> Iterator[Pair]:
    """Yields every DequantizeLinear with what comes before it, in the order of the file."""
    for node in graph.of('DequantizeLinear'):
        pair = graph.pair(node.output[0])
        if pair is not None:
            yield pair


def same_values(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    """Compares two scales or zero points; NaN equals NaN, a missing one only a missing one."""
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b, equal_nan=a.dtype.kind == 'f')
