"""What a sensitivity analysis knows of each unit, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmdet3d_quant.sensitivity.cost import Costs, plain
from mmdet3d_quant.sensitivity.search import Step, front
from mmdet3d_quant.sensitivity.units import Unit


@dataclass
class Row:
    """What is known of a unit.

    Attributes:
        unit: The unit.
        predicted: Noise at the judged maps by gradients; None if no map depends on the unit.
        alone: The same, measured with only this unit quantized; None if not measured.
        map: mAP in points of the quantized model with this unit float; None if not measured.
        gain: Of it, how much more than all INT8.
        spread: Standard deviation of the gain over resampled frames.
        cost: Seconds, bytes and conversions that making it float adds to all INT8.
        own_int8: Seconds and bytes of the unit itself, in INT8.
        own_float: The same in float.
    """

    unit: Unit
    predicted: float | None = None
    alone: float | None = None
    map: float | None = None
    gain: float | None = None
    spread: float | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    own_int8: dict[str, Any] = field(default_factory=dict)
    own_float: dict[str, Any] = field(default_factory=dict)

    @property
    def noise(self) -> float:
        """The measured noise where there is one, else the predicted one."""
        return self.alone if self.alone is not None else self.predicted or 0.0


def predicted_noise(unit: Unit, products: Sequence[Mapping[str, Sequence[float]]]) -> float | None:
    """Computes the predicted noise of a unit from the products of its members.

    Args:
        unit: The unit.
        products: By frame, of :class:`mmdet3d_quant.sensitivity.taylor.Taylor`.

    Returns:
        float, the mean over frames and probes of the square of the members' sum; None if no map
        depends on any of them.
    """
    sums = [
        np.sum([frame[name] for name in unit.members if name in frame], axis=0)
        for frame in products
        if any(name in frame for name in unit.members)
    ]
    if not sums:
        return None
    probes = len(np.atleast_1d(sums[0]))
    return float(sum((row**2).sum() for row in sums) / (len(products) * probes))


def row_facts(
    rows: Sequence[Row],
    steps: Sequence[Step],
    costs: Costs,
    base: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Puts all numbers into plain values that JSON takes.

    Args:
        rows: The noisiest unit first.
        steps: The order in which units become float.
        costs: Of the model.
        base: Scores of the float and the all-INT8 model; None if boxes were not scored.
    """
    points = [(row.cost['seconds'], -row.noise) for row in rows]
    best = front(points)
    return dict(
        engine=costs.rates.name,
        measured=sorted(costs.measured),
        int8=plain(costs.total()),
        float=plain(costs.total(costs.members)),
        noise=sum(row.noise for row in rows),
        scores=None if base is None else dict(base),
        units=[
            dict(
                name=row.unit.name,
                members=list(row.unit.members),
                **{k: getattr(row, k) for k in ('predicted', 'alone', 'noise', 'map', 'gain')},
                **{k: getattr(row, k) for k in ('spread', 'cost', 'own_int8', 'own_float')},
                front=i in best,
            )
            for i, row in enumerate(rows)
        ],
        order=[dict(unit=s.unit.name, noise=s.noise, **plain(s.total)) for s in steps],
    )
