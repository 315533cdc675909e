"""Order of a head's queries, which two runs may give in different orders."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmdet3d_quant.engines import Arrays
from mmdet3d_quant.export.targets import coding_of

#: How far apart two queries are at most for what they are, in cells; less than for where.
_CONTENT = 1e-3
#: Share of the queries that may be others where tensors are rounded to FP16: peaks are taken by
#: rank, and rounding changes the last ranks.
SPARE = 0.05


def align(expected: Arrays, found: Arrays, spare: float = 0.0) -> Arrays:
    """Reorders the queries of a head to match another run, one to one.

    Queries are the highest peaks in falling order; where two are equal but for the last bit, two
    engines order them differently.

    Args:
        expected: Outputs of a cut, by name; of ``head.bbox`` (1, ..., P) each.
        found: The same of another run.
        spare: Share of the queries that may lie elsewhere, by more than a cell; they become those
            of ``expected``, so that the others are compared.

    Returns:
        Arrays by name: of a head, ``found`` with a query for each one of ``expected``, such that
        classes and places differ least in sum, and where places coincide the other outputs; of any
        other cut, ``found`` as it is.
    """
    coding = coding_of(expected)
    if coding is None:
        return found
    apart = np.abs(coding.places(expected)[:, None] - coding.places(found)[None]).sum(axis=2)
    content = np.abs(_rows(expected)[:, None] - _rows({n: found[n] for n in expected})[None]).mean(
        axis=2
    )
    cost = apart + _CONTENT * content / (1 + content)
    worst = 2 * np.nanmax(cost, initial=1, where=np.isfinite(cost))
    order = linear_sum_assignment(np.where(np.isfinite(cost), cost, worst))[1]
    result = {name: value[..., order] for name, value in found.items()}
    far = np.flatnonzero(apart[np.arange(len(order)), order] > 1)
    if 0 < len(far) <= spare * len(order):
        for name, value in expected.items():
            result[name][..., far] = value[..., far]
    return result


def _rows(outputs: Arrays) -> np.ndarray:
    """Puts all outputs of a head side by side: (P, channels), in the order of their names."""
    rows = [outputs[n][0].reshape(-1, outputs[n].shape[-1]).T for n in sorted(outputs)]
    return np.concatenate(rows, axis=1)
