"""Numbers that JSON lacks: infinities and NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def finite_or_none(value: float) -> float | None:
    """Replaces a number that JSON lacks by None, which a page shows as not measured."""
    return float(value) if math.isfinite(value) else None


def finite_or_text(value: Any) -> Any:
    """Replaces the numbers that JSON lacks by text, also inside dicts.

    Returns:
        The same value with ``'inf'``, ``'-inf'`` or ``'nan'`` for such numbers.

    Example:
        >>> finite_or_text(dict(score=1.5, rot=float('inf')))
        {'score': 1.5, 'rot': 'inf'}
    """
    if isinstance(value, dict):
        return {key: finite_or_text(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def nonfinite_entries(state: Mapping[str, Tensor]) -> list[str]:
    """Finds the entries of a state dict that hold NaN or infinity.

    A range (``_amax``) that is not calibrated is NaN, and none of them.
    """
    return [
        name
        for name, tensor in state.items()
        if name.rpartition('.')[2] != '_amax'
        and tensor.is_floating_point()
        and not bool(torch.isfinite(tensor).all())
    ]
