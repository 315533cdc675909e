"""Ranges for UINT8: where a quantizer's range would be in 255 steps, for files that have them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmdet3d_quant.core.formats import UINT8, Format
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.core.spec import QuantSpec

_KEY = '_uint8_range'


@dataclass(frozen=True)
class UnsignedSpec(QuantSpec):
    """Grid of a tensor that is never negative: ``amax / 255`` from step to step."""

    @property
    def format(self) -> Format:
        """The numbers of the grid, in steps."""
        return UINT8


def set_unsigned_amax(quantizer: Quantizer, amax: float) -> None:
    """Notes a quantizer's range for UINT8; it counts as long as the quantizer's own stays."""
    setattr(quantizer, _KEY, (float(quantizer._amax), float(amax)))


def unsigned_amax(quantizer: Quantizer) -> float:
    """Finds the range limit for UINT8: the quantizer's own where none was noted for that."""
    own = float(quantizer._amax)
    known, amax = getattr(quantizer, _KEY, (own, own))
    return amax if known == own else own


def unsigned_ranges(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Lists the notes of a model's quantizers, for the ``meta`` of a checkpoint.

    Returns:
        Dict from name to the quantizer's own range and that for UINT8.
    """
    found = {name: getattr(q, _KEY, None) for name, q in quantizers(model).items()}
    return {name: pair for name, pair in found.items() if pair is not None}


def load_unsigned_ranges(model: nn.Module, ranges: Any) -> None:
    """Notes what :func:`unsigned_ranges` has listed; names that the model lacks are left out.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(ranges, Mapping):
        raise ValueError(f'unsigned_ranges: expected a dict, got {type(ranges).__name__}')
    for name, quantizer in quantizers(model).items():
        if name in ranges:
            pair = ranges[name]
            if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_fits, pair))):
                raise ValueError(
                    f'unsigned_ranges of {name}: expected two floats, finite and >= 0, got '
                    f'{reprlib.repr(pair)}'
                )
            setattr(quantizer, _KEY, tuple(pair))


def _fits(value: Any) -> bool:
    return isinstance(value, float) and 0 <= value < math.inf
