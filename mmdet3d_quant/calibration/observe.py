"""Statistics of a model's activations: histograms per quantizer, collected batch by batch."""

from __future__ import annotations

import copy
import weakref
from functools import partial
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import torch
from mmengine.dist import all_gather_object
from torch import Tensor, nn

from mmdet3d_quant.calibration.histogram import TENSORS, Histogram, merge_all
from mmdet3d_quant.calibration.joins import Joins
from mmdet3d_quant.calibration.peaks import Peaks
from mmdet3d_quant.core.copies import deep_copy
from mmdet3d_quant.core.macs import counting
from mmdet3d_quant.core.modes import evaluating, quantizers, set_mode
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.fold import without_bn

Forward = Callable[[nn.Module, Any], Any]


class Statistics:
    """One :class:`Histogram` per activation quantizer, and the batches that are in them.

    Statistics of different batches merge exactly, in any order: those of several processes, or of
    a run that was interrupted and its continuation, are those of one run.

    Args:
        names: Names of the quantizers, in the order of the model.

    Attributes:
        histograms: By name.
        peaks: By name, of those that were reached.
        batches: Numbers of the batches in the histograms.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.histograms = {name: Histogram(name) for name in names}
        self.peaks: dict[str, Peaks] = {}
        self.batches: set[int] = set()

    def merge(self, other: Statistics) -> None:
        """Adds the statistics of other batches; an interrupt cannot leave it half done.

        Raises:
            ValueError: If some batches are in both, or the quantizers differ.
        """
        if self.histograms.keys() != other.histograms.keys():
            raise ValueError('statistics of different quantizers cannot be merged')
        if self.batches & other.batches:
            both = sorted(self.batches & other.batches)
            raise ValueError(f'batch {both[0]} would be counted twice')
        merged = {name: copy.copy(h) for name, h in self.histograms.items()}
        merge_all((histogram, other.histograms[name]) for name, histogram in merged.items())
        peaks = dict(self.peaks)
        for name, more in other.peaks.items():
            peaks[name] = peaks.get(name, Peaks()).merge(more)
        vars(self).update(histograms=merged, peaks=peaks, batches=self.batches | other.batches)

    def gathered(self) -> Statistics:
        """Merges the statistics of all processes into new ones."""
        total = Statistics(self.histograms)
        for state in all_gather_object(self.state_dict()):
            part = Statistics(self.histograms)
            part.load_state_dict(state)
            total.merge(part)
        return total

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values and stacked CPU tensors, for ``torch.save``."""
        states = [h.state_dict() for h in self.histograms.values()]
        stacked = {n: torch.stack([s[n] for s in states]) for n in TENSORS} if states else {}
        counts = {n: [s[n] for s in states] for n in ('num_elements', 'num_tensors')}
        peaks = {name: p.state_dict() for name, p in self.peaks.items()}
        names = list(self.histograms)
        return dict(stacked, **counts, names=names, peaks=peaks, batches=sorted(self.batches))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the statistics from a :meth:`state_dict`.

        Raises:
            ValueError: If it has other quantizers.
        """
        if list(state['names']) != list(self.histograms):
            raise ValueError('these statistics are of a model with other quantizers')
        keys = (*TENSORS, 'num_elements', 'num_tensors')
        for i, histogram in enumerate(self.histograms.values()):
            histogram.load_state_dict({key: state[key][i] for key in keys})
        self.peaks = {name: Peaks.of_state(p) for name, p in state['peaks'].items()}
        self.batches = set(state['batches'])


def activation_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Activation quantizers by name, without those kept float."""
    weights = set(weight_layers(model))
    return {
        n: q for n, q in quantizers(model).items() if q.float_reason is None and n not in weights
    }


def weight_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Quantized layers by the name of their weight quantizer, without those kept float."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}
    return {
        f'{n}._weight_quantizer' if n else '_weight_quantizer': m
        for n, m in layers.items()
        if m._weight_quantizer.float_reason is None
    }


def observe(
    model: nn.Module,
    batches: Iterable[tuple[int, Any]],
    statistics: Statistics,
    forward: Forward | None = None,
    macs: dict[str, int] | None = None,
) -> Iterator[int]:
    """Runs batches through the float model and adds the quantizers' inputs to the statistics.

    A generator: every step is a batch; between steps the statistics are complete and the model is
    as before. During a batch BN is folded into the convolutions, as in what is exported: the same
    tensors up to rounding, in less time than the observing takes. A copy of the first batch is
    run before, to see which BN reads what.

    Args:
        model: The model; in eval mode and mode ``observe`` meanwhile, then as before.
        batches: Numbered batches, of whatever type ``forward`` takes.
        statistics: Statistics to add to.
        forward: See :func:`mmdet3d_quant.calibrate`.
        macs: Receives the multiply-accumulates of each layer on the first batch, unless it has
            some; see :class:`mmdet3d_quant.core.macs.counting`.

    Yields:
        Number of each batch, once it is in the statistics.

    Raises:
        NonFiniteError: If a tensor has NaN or infinity; names the first quantizer that saw it.
            The statistics are then without that batch.
    """
    observed = activation_quantizers(model)
    axes = _channel_axes(model)
    folded: without_bn | None = None
    for number, batch in batches:
        part = Statistics(observed)
        seen, joins = _Seen(), Joins()
        try:
            for name, histogram in part.histograms.items():
                peaks = part.peaks[name] = Peaks()
                axis = axes.get(observed[name], 1)
                collector = _Collector(histogram, seen, peaks, axis, joins)
                observed[name]._calibrator = collector
            with set_mode(model, 'observe'), evaluating(model), torch.no_grad():
                if folded is None:
                    # A forward may change its batch, or take something out of it.
                    folded = without_bn(model, partial(_run_with, forward or run, deep_copy(batch)))
                with folded, joins:
                    if macs is None or macs:
                        (forward or run)(model, batch)
                    else:
                        with counting(model) as counted:
                            (forward or run)(model, batch)
                        macs.update(counted.macs)
        finally:
            for quantizer in observed.values():
                quantizer._calibrator = None
        seen.require_finite()
        for peaks in part.peaks.values():
            peaks.number(number)
        part.batches = {number}
        statistics.merge(part)
        yield number


def _channel_axes(model: nn.Module) -> dict[nn.Module, int]:
    """Finds the input quantizers of linear layers, whose channels come last; others' are axis 1."""
    linear = (m for m in model.modules() if isinstance(m, QuantLayer) and isinstance(m, nn.Linear))
    return {layer._input_quantizer: -1 for layer in linear}


def _run_with(forward: Forward, batch: Any, model: nn.Module) -> Any:
    return forward(model, batch)


class _Seen:
    """Cache of the histograms of a batch: a tensor with several quantizers is counted once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Histogram]] = {}
        self.order: list[Histogram] = []

    def of(self, x: Tensor) -> Histogram:
        """Histogram of a tensor, from the cache if the same tensor was counted before."""
        if x.is_inference():  # it has no version
            return Histogram.of(x)
        ref, version, histogram = self._known.get(id(x), (None, -1, None))
        if histogram is None or ref is None or ref() is not x or version != x._version:
            histogram = Histogram.of(x)
            self._known[id(x)] = (weakref.ref(x), x._version, histogram)
        return histogram

    def require_finite(self) -> None:
        """Checks all GPU tensors of the batch with one synchronisation.

        Raises:
            NonFiniteError: If one has NaN or infinity; names the first.
        """
        if self.order and self.order[0].bins.device.type != 'cpu':
            ends = [torch.stack([getattr(h, n) for h in self.order]) for n in ('lowest', 'highest')]
            for i in (
                torch.isfinite(torch.stack(ends)).all(0).logical_not().nonzero().flatten().tolist()
            ):
                self.order[i].require_finite()


class _Collector:
    """Calibrator of one quantizer for one batch: adds its inputs to histogram and peaks."""

    def __init__(
        self, histogram: Histogram, seen: _Seen, peaks: Peaks, axis: int, joins: Joins
    ) -> None:
        self.histogram, self.seen, self.peaks = histogram, seen, peaks
        self.axis, self.joins = axis, joins

    def collect(self, x: Tensor) -> None:
        if self.histogram.num_tensors == 0:
            self.seen.order.append(self.histogram)
        self.histogram.add(self.seen.of(x))
        self.peaks.add(x, self.axis, self.joins.parts(x) if self.axis == 1 else ())


def run(model: nn.Module, batch: Any) -> Any:
    """Runs a model on a batch: a tensor, a mapping, or a sequence of arguments.

    A mapping goes to ``test_step`` if the model has one, else it is passed as keyword arguments.

    Raises:
        TypeError: If the batch is of another type.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model.test_step(batch) if hasattr(model, 'test_step') else model(**batch)
    if not isinstance(batch, Sequence) or isinstance(batch, str):
        raise TypeError(
            f'a batch is a {type(batch).__name__}: give a tensor, a dict or a sequence of '
            'arguments, or say with `forward` how the model takes it'
        )
    return model(*batch)
