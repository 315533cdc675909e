"""Range search from statistics: one range per tie group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mmdet3d_quant.calibration.amax import search_many
from mmdet3d_quant.calibration.histogram import Histogram
from mmdet3d_quant.calibration.observe import Statistics
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.known import KnownRange
from mmdet3d_quant.core.spec import Method, QuantSpec

#: What ``auto`` chooses from.
CANDIDATES = tuple(
    Method.parse(m) for m in ('mse', 'max', 'entropy', 'percentile:99.99', 'percentile:99.999')
)


#: A range within so many bins of 4096 is searched again in a view that is so many octaves finer,
#: down to this one.
_LOW, _ZOOM, _DEEPEST = 256, 3, 15
#: Share of the values that may lie beyond a view in which ``entropy`` searches.
_FEW = 1e-4


@dataclass(frozen=True)
class Unit:
    """Quantizers that get one range: a tie group, or one on its own.

    Attributes:
        names: Names of the quantizers.
        method: Method of their range; the first quantizer's, where a pattern cuts a group.
        histogram: Merged histogram of their inputs.
        spec: Their grid.
        known: Their range, where it is known without data.
    """

    names: tuple[str, ...]
    method: Method
    histogram: Histogram
    spec: QuantSpec
    known: KnownRange | None = None


def suits(method: Method, spec: QuantSpec) -> bool:
    """Tells whether a method is for the numbers of a grid: ``entropy`` wants them evenly spaced."""
    return method.name != 'entropy' or spec.format.even


def units(
    statistics: Statistics,
    groups: Iterable[tuple[str, ...]],
    methods: Mapping[str, Method],
    specs: Mapping[str, QuantSpec],
    known: Mapping[str, KnownRange] | None = None,
) -> list[Unit]:
    """Merges the statistics of each tie group; other quantizers become units of their own.

    Args:
        statistics: Statistics of all quantizers.
        groups: Names of the quantizers that share a range, per group.
        methods: Methods by name.
        specs: Grids by name.
        known: Ranges that are known without data, by name; one of a group is that of all.

    Returns:
        List of :class:`Unit` in the order of the model.
    """
    group_of = {name: group for group in groups for name in group}
    members = dict.fromkeys(group_of.get(name, (name,)) for name in statistics.histograms)
    result = []
    for names in members:
        total = Histogram(names[0])
        for name in names:
            total.merge(statistics.histograms[name])
        found = next((known[n] for n in names if n in known), None) if known else None
        result.append(Unit(names, methods[names[0]], total, specs[names[0]], found))
    return result


def search(units: list[Unit], method: Method | None = None) -> list[float]:
    """Searches the range of each unit, unless it is known.

    Args:
        units: The units.
        method: Method for all units instead of their own; ``auto`` counts as ``mse``.

    Returns:
        List of float, one amax per unit.
    """
    result = [u.known.amax if u.known else u.histogram.amax for u in units]
    batches: dict[tuple[Method, QuantSpec], list[int]] = {}
    for i, unit in enumerate(units):
        wanted = method or unit.method
        wanted = CANDIDATES[0] if wanted.name == 'auto' else wanted
        exact = unit.known or wanted.name == 'max'  # max is known more exactly than its bin
        if not exact and result[i] > 0:
            batches.setdefault((wanted, unit.spec), []).append(i)
    for (wanted, spec), indices in batches.items():
        for i, amax in strict_zip(indices, _search([units[i] for i in indices], wanted, spec)):
            result[i] = amax or result[i]  # 0 where that many values are zero
    return result


def _search(units: list[Unit], method: Method, spec: QuantSpec) -> list[float]:
    """Searches ranges by one method, in a finer view of a histogram where the range is small.

    The bins of a view are of equal width. Where the range lies in the lowest 1/16, or almost all
    values do, as after a single large one, the search goes on in the lowest eighth, whose bins
    are eight times as fine; 2048 bins, as pytorch-quantization has them, hold no candidate there.
    """
    histograms = [unit.histogram for unit in units]
    octaves = [_first_view(h) if method.name == 'entropy' else 0 for h in histograms]
    result = [0.0] * len(units)
    left = list(range(len(units)))
    while left:
        views = [
            (*histograms[i].trimmed(octaves[i]), histograms[i].beyond(octaves[i])) for i in left
        ]
        for i, (_, edges, _), amax in strict_zip(left, views, search_many(views, method, spec)):
            result[i] = amax
            if amax <= edges[1] * _LOW and octaves[i] + _ZOOM <= _DEEPEST:
                octaves[i] += _ZOOM
            else:
                octaves[i] = -1
        left = [i for i in left if octaves[i] >= 0]
    return result


def _first_view(histogram: Histogram) -> int:
    """Number of octaves at the top that hold next to no values."""
    octaves = 0
    while octaves + _ZOOM <= _DEEPEST:
        counts, _ = histogram.view(octaves)
        if counts[_LOW:].sum() + histogram.beyond(octaves).number > _FEW * histogram.num_elements:
            break
        octaves += _ZOOM
    return octaves
