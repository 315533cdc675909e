"""Convergence of the ranges with the number of batches."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mmdet3d_quant.core.compat import strict_zip

#: A range has settled when it moved less than this, relatively.
TOLERANCE = 0.02
#: Share of the ranges that must have settled, and the number of looks in a row.
_SHARE, _LOOKS = 0.95, 2


@dataclass(frozen=True)
class Look:
    """The ranges at one number of batches, against those of the look before.

    Attributes:
        num_batches: Batches in the statistics.
        ranges: amax per unit.
        median: Median relative change.
        high: Change that 95 % of the units stay below.
        moved: Index of the unit that changed most, None at the first look.
    """

    num_batches: int
    ranges: tuple[float, ...]
    median: float = math.inf
    high: float = math.inf
    moved: int | None = None


class Stability:
    """Looks at the ranges when the number of batches has doubled.

    Args:
        tolerance: Relative change below which a range has settled.

    Attributes:
        looks: The looks so far.
    """

    def __init__(self, tolerance: float = TOLERANCE) -> None:
        if not 0 < tolerance < 1:
            raise ValueError(f'the tolerance must be between 0 and 1, got {tolerance}')
        self.tolerance = tolerance
        self.looks: list[Look] = []

    @staticmethod
    def due(rounds: int) -> bool:
        """True after 1, 2, 4, 8, ... rounds, when a look is due."""
        return rounds > 0 and rounds & (rounds - 1) == 0

    def look(self, num_batches: int, ranges: list[float]) -> None:
        """Compares ranges with those of the last look and appends a look.

        Args:
            num_batches: Batches in the statistics; a number that has a look adds none.
            ranges: amax per unit.
        """
        if self.looks and self.looks[-1].num_batches == num_batches:
            return
        if not self.looks:
            self.looks.append(Look(num_batches, tuple(ranges)))
            return
        changes = [
            abs(new - old) / max(new, old) if new != old else 0.0
            for new, old in strict_zip(ranges, self.looks[-1].ranges)
        ]
        ordered = sorted(changes)
        high = ordered[math.ceil(_SHARE * len(ordered)) - 1]
        median = ordered[(len(ordered) - 1) // 2]
        moved = max(range(len(changes)), key=changes.__getitem__)
        self.looks.append(Look(num_batches, tuple(ranges), median, high, moved))

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the looks as plain values."""
        return [asdict(look) for look in self.looks]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Restores the looks from a :meth:`state_dict`."""
        self.looks = [Look(**{**look, 'ranges': tuple(look['ranges'])}) for look in state]

    @property
    def settled_at(self) -> int | None:
        """Number of batches at the look before the trailing run of settled looks.

        None unless that run has at least 2 looks.
        """
        settled = 0
        for look in reversed(self.looks):
            if look.high >= self.tolerance:
                break
            settled += 1
        return self.looks[-settled - 1].num_batches if settled >= _LOOKS else None
