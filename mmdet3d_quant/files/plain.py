"""Numbers that JSON lacks: infinities and NaN."""

from __future__ import annotations

import math
from typing import Any


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
