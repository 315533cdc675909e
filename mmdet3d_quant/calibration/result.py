"""Results of calibration as plain data, and the protocol of steps that follow it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from mmdet3d_quant.calibration.choose import Unit
from mmdet3d_quant.calibration.health import Health
from mmdet3d_quant.calibration.observe import Statistics
from mmdet3d_quant.calibration.stability import Look
from mmdet3d_quant.core.coverage import Coverage
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.formats import INT8


class CalibrationError(QuantError):
    """Calibration could not give every quantizer a range; the model is unchanged."""


@dataclass(frozen=True)
class Choice:
    """The range of a tie group, or of a quantizer on its own.

    Attributes:
        unit: The quantizers and what they saw.
        amax: Their range limit.
        method: How it was chosen, as text; of ``auto`` also what won.
    """

    unit: Unit
    amax: float
    method: str


class Correction(Protocol):
    """A step after the ranges, such as bias correction: changes weights, biases or ranges."""

    def __call__(
        self, model: nn.Module, choices: list[Choice], held_out: list[tuple[int, Any]]
    ) -> None:
        """Corrects a model in place.

        Args:
            model: Calibrated, in mode ``quant``.
            choices: The ranges that were chosen.
            held_out: Numbered batches that the ranges were not chosen from.
        """


@runtime_checkable
class Comparing(Correction, Protocol):
    """A step that compares with the float model, which it moves, too.

    Attributes:
        exact: While it runs a copy of the model from before the first of such steps that follow
            each other.
    """

    exact: nn.Module | None


@dataclass(frozen=True)
class CalibratedRange:
    """Range of one activation quantizer, and how its inputs fit.

    Attributes:
        name: Name of the quantizer in the model.
        amax: Its range limit.
        method: How it was chosen; of ``auto`` also what won.
        largest: Largest absolute value that it saw itself.
        num_elements: Number of values that it saw.
        num_tensors: Number of tensors that it saw; one a batch, but for a concat's.
        group: Index of its tie group in ``Calibration.groups``, or None.
        health: How its own tensors fit the range.
        largest_in: Number of the batch that the largest value is in.
        format: Name of its number format.
    """

    name: str
    amax: float
    method: str
    largest: float
    num_elements: int
    num_tensors: int
    group: int | None
    health: Health
    largest_in: int | None = None
    format: str = INT8.name


@dataclass(frozen=True)
class Calibration:
    """Result of :func:`calibrate`.

    Attributes:
        method: The method or methods, as text.
        num_batches: Batches seen, by all processes.
        ranges: One entry per activation quantizer, in the order of the model.
        num_weights: Number of weight quantizers, calibrated per channel from the weights.
        groups: Names of the quantizers that share a scale.
        kept_float: Name and reason of the quantizers kept float.
        looks: How the ranges moved with the number of batches.
        settled_at: Batches after which they moved no more, or None.
        statistics: Statistics that the ranges were chosen from.
        coverage: Which layers are quantized, with their multiply-accumulates on the first batch
            that this process observed.
    """

    method: str
    num_batches: int
    ranges: tuple[CalibratedRange, ...]
    num_weights: int
    groups: tuple[tuple[str, ...], ...]
    kept_float: dict[str, str]
    looks: tuple[Look, ...]
    settled_at: int | None
    statistics: Statistics
    coverage: Coverage
