"""A Q/DQ pair of a graph, as rules see it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto


@dataclass(frozen=True)
class Pair:
    """A DequantizeLinear and what comes before it.

    Attributes:
        dq: The DequantizeLinear.
        q: The QuantizeLinear before it; None for integers stored in the file.
        source: The tensor that is quantized.
        scale: Flat float array, or None if it is no constant.
        zero: Zero points, flat, or None if absent or no constant.
        axis: Channel axis of ``scale``.
        dims: Number of dimensions of ``scale``; 0 if it is no constant.
        kind: Type of the integers in ONNX's words, such as ``INT8``; empty if it is not known.
        blocks: Whether scales are those of blocks.
    """

    dq: NodeProto
    q: NodeProto | None
    source: str
    scale: np.ndarray | None
    zero: np.ndarray | None
    axis: int
    dims: int = 0
    kind: str = ''
    blocks: bool = False
