"""Post-training calibration: from batches of data to a range for every quantizer."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from mmdet3d_quant.histogram import Histogram
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.modes import quantizers, set_mode
from mmdet3d_quant.spec import Method
from mmdet3d_quant.ties import ties

Forward = Callable[[nn.Module, Any], Any]


class CalibrationError(RuntimeError):
    """Calibration could not give every quantizer a range; the model is unchanged."""


@dataclass(frozen=True)
class CalibratedRange:
    """What calibration found for one activation quantizer.

    Attributes:
        name: Name of the quantizer in the model.
        amax: Its range limit.
        largest: Largest absolute value that it saw itself.
        num_elements: Number of values that it saw.
        group: Index of its tie group in ``Calibration.groups``, or None.
    """

    name: str
    amax: float
    largest: float
    num_elements: int
    group: int | None


@dataclass(frozen=True)
class Calibration:
    """Result of :func:`calibrate`.

    Attributes:
        method: The method, as text.
        num_batches: Batches seen.
        ranges: One entry per activation quantizer, in the order of the model.
        num_weights: Number of weight quantizers, calibrated per channel from the weights.
        groups: Names of the quantizers that share a scale.
        kept_float: Name and reason of the quantizers kept float.
    """

    method: str
    num_batches: int
    ranges: tuple[CalibratedRange, ...]
    num_weights: int
    groups: tuple[tuple[str, ...], ...]
    kept_float: dict[str, str]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    method: str | Method = 'mse',
    forward: Forward | None = None,
    num_batches: int | None = None,
) -> Calibration:
    """Runs batches through the float model and sets the range of every quantizer.

    Activations are observed in eval mode without gradients; the statistics of tied quantizers
    are merged before their common range is computed. Weight ranges are the largest absolute
    weight of each output channel. The model is left in mode ``quant``, its training flags as
    they were. When anything fails the model is as before.

    Args:
        model: A model with quantized layers, float weights loaded.
        batches: Batches, of whatever type ``forward`` takes.
        method: ``'max'``, ``'percentile'`` (99.99), ``'percentile:99.9'``, ``'entropy'`` or
            ``'mse'``.
        forward: ``forward(model, batch)`` runs the model. By default a tensor is passed as
            ``model(batch)``, a sequence as ``model(*batch)``, a dict as
            ``model.test_step(batch)`` where the model has one (mmengine) and else as
            ``model(**batch)``.
        num_batches: Stop after so many; all by default.

    Returns:
        What was calibrated.

    Raises:
        ValueError: If the method is unknown, ``num_batches`` < 1, or nothing is quantized.
        NonFiniteError: If a tensor has NaN or infinity; names the first quantizer that saw it.
        CalibrationError: If there are no batches, or a quantizer was never reached.
    """
    method = Method.parse(method)
    if num_batches is not None and num_batches < 1:
        raise ValueError(f'num_batches must be at least 1, got {num_batches}')
    active = {n: q for n, q in quantizers(model).items() if q.float_reason is None}
    if not active:
        raise ValueError(
            f'{type(model).__name__} has no quantized layers: use Quant* types in its config'
        )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}
    weights = {f'{n}._weight_quantizer' if n else '_weight_quantizer': m for n, m in layers.items()}
    groups = ties(model)
    seen = {n: Histogram(n) for n in active if n not in weights}

    count = _observe(model, seen, islice(batches, num_batches), forward or _run)
    if count == 0:
        raise CalibrationError('there are no batches to calibrate on: the data set is empty')
    missed = [n for n, h in seen.items() if h.num_batches == 0]
    if missed:
        raise CalibrationError(
            f'{len(missed)} quantizer(s) were never reached by the data:\n  '
            + '\n  '.join(missed[:20])
            + "\nRemove the layers, or keep them float with `skip` in the model's config"
        )

    group_of = {n: i for i, group in enumerate(groups) for n in group}
    shared = [_merged([seen[n] for n in group], group[0]) for group in groups]
    new: dict[str, float | Tensor] = {}
    for name, own in seen.items():
        source = shared[group_of[name]] if name in group_of else own
        found = source.compute_amax(method, active[name].spec)
        assert found is not None  # every histogram saw a batch
        new[name] = found
    ranges = tuple(
        CalibratedRange(n, float(new[n]), h.amax, h.num_elements, group_of.get(n))
        for n, h in seen.items()
    )
    kept_float = {
        n: q.float_reason for n, q in quantizers(model).items() if q.float_reason is not None
    }
    for name, layer in weights.items():
        if name in active:
            new[name] = layer.weight_amax()
    for name, amax in new.items():
        active[name].amax = amax
    set_mode(model, 'quant')
    return Calibration(str(method), count, ranges, len(new) - len(seen), tuple(groups), kept_float)


def _observe(
    model: nn.Module, seen: Mapping[str, Histogram], batches: Iterable[Any], forward: Forward
) -> int:
    """Lets the histograms see the batches; returns their number."""
    found = quantizers(model)
    count = 0
    try:
        for name, histogram in seen.items():
            found[name]._calibrator = histogram
        with set_mode(model, 'observe'), _eval(model), torch.no_grad():
            for batch in batches:
                forward(model, batch)
                count += 1
    finally:
        for name in seen:
            found[name]._calibrator = None
    return count


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    """Eval mode, then every module's training flag as it was."""
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _merged(histograms: Iterable[Histogram], name: str) -> Histogram:
    total = Histogram(name)
    for histogram in histograms:
        total.merge(histogram)
    return total


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model.test_step(batch) if hasattr(model, 'test_step') else model(**batch)
    return model(*batch)
