"""Factors by channel, chosen so that what rounding costs at the output of the readers is least.

That is estimated from a sample of a reader's input: the error of each input channel, weighed by the
weights that read it, and that of the weights, weighed by the size of the channel. A channel that is
small beside the others gains by a factor; the weights of the others lose, since each output channel
of a weight has one range. Ranges come from every other batch and the error from the rest, so that a
channel that is large in some batches only is not lifted until it is clipped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Dict, List, Tuple, Union

import torch
from torch import Tensor, nn

from mmdet3d_quant.calibration.choose import Unit, search
from mmdet3d_quant.calibration.histogram import Histogram
from mmdet3d_quant.core.spec import Method
from mmdet3d_quant.improve.moves import ChannelMove, apply, by_input, num_inputs, spread
from mmdet3d_quant.improve.readers import Reader
from mmdet3d_quant.layers.base import QuantLayer

#: Shares of the range that go to the weights, 0, to the activations, 1, or to both.
ALPHAS = (0.25, 0.5, 0.75, 1.0)
#: Least gain, dB, and largest power of two: more helps no weight of 4 bits, and a channel that is
#: larger in other data would be clipped.
LEAST, LARGEST = 0.1, 8

#: (channels, values) each: what ranges are found on, and what errors are measured on.
Halves = Tuple[Tensor, Tensor]
#: A layer's source and all that read that; or why there is none that can be changed.
Path = Union[str, Tuple[str, Tuple[Reader, ...]]]


@dataclass(frozen=True)
class Scaled:
    """What was done to the channels of a model.

    Attributes:
        moves: What was changed.
        left: Reason by name of each layer whose input stays as it is.
    """

    moves: Tuple[ChannelMove, ...]
    left: Dict[str, str]

    def plain(self) -> dict[str, Any]:
        """Describes it in values that JSON takes."""
        moves = [dict(move.plain(), text=str(move)) for move in self.moves]
        return dict(moves=moves, left=self.left)

    def __str__(self) -> str:
        reasons = Counter(self.left.values()).most_common()
        stay = ''.join(f'; {count} stay: {reason}' for reason, count in reasons)
        return f'{len(self.moves)} layers scaled by channel{stay}'


@dataclass
class Seen:
    """What a layer reads.

    Attributes:
        peak: (channels,), the largest absolute value of each.
        rows: Of each batch (channels, values), a part of what was read.
    """

    peak: Tensor
    rows: List[Tensor] = field(default_factory=list)

    def halves(self) -> Halves:
        """Joins every other batch, and the rest; a single batch is both."""
        fitted, judged = self.rows[::2], self.rows[1::2] or self.rows
        return torch.cat(fitted, 1), torch.cat(judged, 1)


def plan_factors(
    model: nn.Module,
    paths: dict[str, tuple[Path, ...]],
    seen: dict[str, Seen],
    alphas: Sequence[float],
) -> Scaled:
    """Finds factors, one source after the other.

    Args:
        model: The model, which stays as it is.
        paths: By layer that shall be scaled the ways to it.
        seen: By layer what it reads; changed.
        alphas: Splits that are tried.

    Returns:
        What is to be moved, and what stays.
    """
    layers = dict(model.named_modules())
    sample = {n: s.halves() for n, s in seen.items() if s.peak.any()}
    moves: list[ChannelMove] = []
    results: dict[str, str] = {}  # by source: why it stays, or nothing
    left: dict[str, str] = {}
    for name, found in paths.items():
        for path in found:
            if isinstance(path, str):
                left[name] = path
                continue
            source, readers = path
            if source not in results:
                move = _best(layers, source, readers, seen, sample, alphas)
                results[source] = '' if move else f'no factors gain {LEAST:g} dB'
                if move:
                    _note(layers, move, seen, sample)
                    apply(model, [move])
                    moves.append(move)
            if results[source]:
                left[name] = results[source]
    apply(model, moves, back=True)
    changed = {reader.layer for move in moves for reader in move.readers}
    return Scaled(tuple(moves), {n: reason for n, reason in left.items() if n not in changed})


def _best(
    layers: dict[str, Any],
    source: str,
    readers: Sequence[Reader],
    seen: dict[str, Seen],
    sample: dict[str, Halves],
    alphas: Sequence[float],
) -> ChannelMove | None:
    rounded = [r for r in readers if r.layer in sample and _is_served(layers[r.layer])]
    if not rounded:
        return None
    # The same tensor is read by all of them, each time the same channels.
    peak = seen[rounded[0].layer].peak[rounded[0].part]
    weight = torch.stack([_weight_peak(layers[r.layer], r) for r in rounded]).amax(0)

    def cost(exponents: Tensor) -> float:
        return sum(_error(layers[r.layer], sample[r.layer], r, exponents) for r in rounded)

    before = cost(torch.zeros_like(peak))
    tried = [exponents_of(peak, weight, alpha) for alpha in alphas]
    costs = [cost(e) if e.any() else math.inf for e in tried]
    best = min(costs)
    if not before or best > before * 10 ** (-LEAST / 10):
        return None
    gain = 10 * math.log10(before / max(best, 1e-30))
    powers = tuple(int(e) for e in tried[costs.index(best)].tolist())
    return ChannelMove(source, tuple(readers), powers, gain)


def exponents_of(peak: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Computes the power of two by which each channel is multiplied.

    It is the one nearest to ``weight ** (1 - alpha) / peak ** alpha``, times one for all of them,
    with which the largest channel stays about as large as it is.

    Args:
        peak: (channels,), the largest absolute value of each.
        weight: (channels,), the largest absolute weight that reads it.
        alpha: Share of the activations: with 1 all channels become as large as the largest.

    Returns:
        float (channels,), whole numbers; 0 for channels without values or weights.
    """
    live = (peak > 0) & (weight > 0)
    if not live.any():
        return torch.zeros_like(peak)
    size = peak.double().log2()
    powers = (1 - alpha) * weight.double().log2() - alpha * size
    common = ((powers + size)[live].max() - size[live].max()).round()
    powers = (powers.round() - common).clamp(-LARGEST, LARGEST)
    return torch.where(live, powers, torch.zeros_like(powers)).to(peak)


def _is_served(layer: QuantLayer) -> bool:
    """Whether a layer rounds its input to evenly spaced numbers; floating ones need no help."""
    quantizer = layer._input_quantizer
    return quantizer.float_reason is None and quantizer.spec.format.even


def _weight_peak(layer: Any, reader: Reader) -> Tensor:
    weight = layer.weight.detach().abs().float()
    peaks = weight.new_zeros(num_inputs(layer))
    peaks.scatter_reduce_(0, _inputs(layer), weight.flatten(), 'amax')
    return peaks[reader.part]


def _by_channel(layer: Any, weight: Tensor) -> Tensor:
    """(input channels,): sums of what belongs to the weights that read each."""
    sums = weight.new_zeros(num_inputs(layer))
    return sums.index_add_(0, _inputs(layer), weight.flatten())


def _inputs(layer: Any) -> Tensor:
    """(weights,): the input channel that each weight reads."""
    numbers = torch.arange(num_inputs(layer), device=layer.weight.device)
    return by_input(layer, numbers).expand(layer.weight.shape).flatten()


def _error(layer: Any, halves: Halves, reader: Reader, exponents: Tensor) -> float:
    """Estimates the error of a layer's output, of the output's power, after a move."""
    fitted, judged = halves
    factor = spread(layer, exponents.exp2(), reader)
    x = judged * factor[:, None]
    weight = layer.weight.detach().float() / by_input(layer, factor)
    spec = layer._input_quantizer.spec
    histogram = Histogram.of(fitted * factor[:, None])
    amax = search([Unit(('',), Method('mse'), histogram, spec)])[0]
    step = spec.format.step(torch.tensor(amax))
    noise = (spec.format.round_(x / step) * step - x).square().mean(1)
    power = x.square().mean(1)
    squares = _by_channel(layer, weight.square())
    error = (noise * squares).sum()
    quantizer = layer._weight_quantizer
    if quantizer.float_reason is None:
        grid = quantizer.spec.format
        steps = grid.step(layer.largest(weight))
        lost = grid.round_(weight / steps) * steps - weight
        error = error + (_by_channel(layer, lost.square()) * power).sum()
    signal = (squares * power).sum()
    return float(error / signal) if signal > 0 else 0.0


def _note(
    layers: dict[str, Any], move: ChannelMove, seen: dict[str, Seen], sample: dict[str, Halves]
) -> None:
    """Scales what was seen of the readers' inputs, as the move will."""
    for reader in move.readers:
        if reader.layer in sample:
            factor = move.factor.to(seen[reader.layer].peak)
            seen[reader.layer].peak[reader.part] *= factor
            for half in sample[reader.layer]:
                half[reader.part] *= factor[:, None]
