"""Range search on histograms by ``max``, ``percentile``, ``entropy`` or ``mse``, in batches.

The definitions are pytorch-quantization's (``calib/histogram.py``), and so are the results. Every
candidate is scored in float64 on any device, in a form that costs little for many histograms;
those within rounding of the best are then scored again with the library's own arithmetic, whose
rounding decides between them.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np

from mmdet3d_quant.calibration.bins import START_BIN, Bins, Device, checked, origin
from mmdet3d_quant.calibration.entropy import least_divergence
from mmdet3d_quant.calibration.mse import least_squared_error
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.formats import Format
from mmdet3d_quant.core.spec import Method, QuantSpec

#: Ranges of histograms: all of one method, each with its grid, on a device.
Search = Callable[[List[Bins], Method, List[QuantSpec], Device], List[float]]


def search_amax(
    hist: np.ndarray,
    edges: np.ndarray,
    method: str | Method,
    spec: QuantSpec | None = None,
    device: Device = None,
) -> float:
    """Searches the range of one histogram; see :func:`search_many`.

    Args:
        hist: Counts, shape (n,).
        edges: Bin edges, ascending from 0 in equal steps, shape (n + 1,).
        method: ``max``, ``percentile``, ``entropy`` or ``mse``.
        spec: The grid; its format matters to ``entropy`` and ``mse``.
        device: Where to search.

    Returns:
        amax, >= 0.

    Raises:
        ValueError: As :func:`search_many`.
    """
    return search_many([(hist, edges)], method, spec, device)[0]


def search_many(
    histograms: Sequence[Tuple[Any, ...]],
    method: str | Method,
    spec: QuantSpec | Sequence[QuantSpec] | None = None,
    device: Device = None,
) -> list[float]:
    """Searches the range of each histogram.

    Ranges are those of pytorch-quantization, with two exceptions where its result comes from NaN:

    - ``entropy``: a range without counts inside (bin 0 aside) has no divergence, and the library
      takes the largest such range. They exist where bins 1 to 127 are empty and others are not.
      Here the best of the rest is taken.
    - ``mse``: squared errors, times counts, that overflow float32 (values from about 1e18).

    By ``entropy`` and ``mse``, a histogram of 128 bins or less gets its last edge; the library has
    no candidates there. The result does not depend on the device.

    Args:
        histograms: Pairs of counts (n,) and bin edges (n + 1,), which ascend from about 0 in
            equal steps. Lengths may differ. A third part, a :class:`Beyond`, tells of the values
            that are larger than the last edge.
        method: ``max``, ``percentile``, ``entropy`` or ``mse``.
        spec: The grid of all, or one per histogram; INT8 by default.
        device: Where to search; on the CPU by default.

    Returns:
        List of float, one amax >= 0 per histogram.

    Raises:
        ValueError: If the method is unknown or needs more than a histogram (``auto``), if the
            numbers of specs, counts or edges do not fit, or if the edges are not equally spaced.
    """
    method = Method.parse(method)
    if method.name not in SEARCHES:
        raise ValueError(f'expected {", ".join(SEARCHES)} for a histogram, got {method.name}')
    bins = [checked(*parts) for parts in histograms]
    spec = QuantSpec() if spec is None else spec
    specs = [spec] * len(bins) if isinstance(spec, QuantSpec) else list(spec)
    if len(specs) != len(bins):
        raise ValueError(f'expected one spec per histogram ({len(bins)}), got {len(specs)}')
    return SEARCHES[method.name](bins, method, specs, device)


def _max(bins: list[Bins], *_: Any) -> list[float]:
    """Upper edge of the last bin."""
    return [float(b.edges[-1]) for b in bins]


def _by_grid(search: Callable[[list[Bins], Format, Device], list[float]]) -> Search:
    """A search of many histograms that share grid and origin, for any histograms."""

    def run(bins: list[Bins], method: Method, specs: list[QuantSpec], device: Device):
        result = _max(bins)  # what has no candidates keeps all
        groups: dict[tuple[Format, float], list[int]] = {}
        for i, b in enumerate(bins):
            if len(b.counts) > START_BIN and b.edges[-1] > b.edges[0]:
                groups.setdefault((specs[i].format, origin(b)), []).append(i)
        for (fmt, _), members in groups.items():
            for i, amax in strict_zip(members, search([bins[i] for i in members], fmt, device)):
                result[i] = amax
        return result

    return run


def _percentiles(bins: list[Bins], method: Method, *_: Any) -> list[float]:
    return [_percentile(b, method.percentile) for b in bins]


def _percentile(bins: Bins, percentile: float) -> float:
    """Lower edge of the first bin up to whose end ``percentile`` percent of the counts lie."""
    total = bins.counts.sum() + bins.beyond.number
    if total == 0:
        return float(bins.edges[0])
    cdf = np.cumsum(bins.counts / total)
    return float(bins.edges[np.searchsorted(cdf, percentile / 100)])


#: By the names of ``core.spec.METHODS``; ``auto`` needs more than a histogram.
SEARCHES: Dict[str, Search] = {
    'max': _max,
    'percentile': _percentiles,
    'entropy': _by_grid(least_divergence),
    'mse': _by_grid(least_squared_error),
}
