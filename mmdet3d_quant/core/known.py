"""Ranges that follow from what a tensor is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownRange:
    """A range that follows from what a tensor is, not from data.

    Attributes:
        amax: The range limit.
        reason: Where it comes from.
    """

    amax: float
    reason: str
