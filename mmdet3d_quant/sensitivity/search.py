"""Which units to make float: an order by noise removed per cost, and how far to go along it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmdet3d_quant.sensitivity.cost import Costs, Total
from mmdet3d_quant.sensitivity.units import Unit

#: The order ends where so little of the predicted noise is left; the rest is float at no use.
REST = 1e-3
#: Units that are tried at each step of the order: those with the most noise.
WIDTH = 24


@dataclass(frozen=True)
class Step:
    """One more unit made float.

    Attributes:
        unit: The unit.
        noise: Predicted noise that is left.
        total: Cost with this and all units before it float.
    """

    unit: Unit
    noise: float
    total: Total


def order(units: Sequence[Unit], noise: Mapping[str, float], costs: Costs) -> list[Step]:
    """Orders units by the noise that each removes for the seconds that it adds.

    What a unit adds depends on those before it: a float unit beside another saves a conversion.

    Args:
        units: The units.
        noise: Predicted noise by name of the unit.
        costs: Of the model.

    Returns:
        Steps from all INT8 on; a step that costs nothing comes first.
    """
    left = sorted((u for u in units if noise[u.name] > 0), key=lambda u: -noise[u.name])
    whole = rest = sum(noise[u.name] for u in left)
    floats: list[str] = []
    now, steps = costs.total(), []
    while left and rest > REST * whole:
        tried = [(costs.total([*floats, *unit.members]), unit) for unit in left[:WIDTH]]
        before = now.seconds

        def worth(entry: tuple[Total, Unit], before: float = before) -> tuple[bool, float]:
            added = entry[0].seconds - before
            gain = noise[entry[1].name]
            return added <= 0, gain / added if added > 0 else gain

        now, unit = max(tried, key=worth)
        left.remove(unit)
        floats += unit.members
        rest = max(rest - noise[unit.name], 0.0)
        steps.append(Step(unit, rest, now))
    return steps


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Finds the points that no other beats in both coordinates, lower being better.

    Returns:
        Their places, by the first coordinate.
    """
    best, found = float('inf'), []
    for place in sorted(range(len(points)), key=lambda i: points[i]):
        if points[place][1] < best:
            best = points[place][1]
            found.append(place)
    return found


def shortest(count: int, good: Callable[[int], bool]) -> int | None:
    """Finds by bisection how many steps are enough.

    Args:
        count: Number of steps.
        good: Whether so many are enough; more are taken to be enough then, too.

    Returns:
        The least number that ``good`` has confirmed, None if ``count`` steps are not enough.
    """
    low, high = -1, count
    if not good(count):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high
