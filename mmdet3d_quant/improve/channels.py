"""Factors by channel between a layer and those that read it, where they make errors smaller.

What rounding costs at the output of a reader is estimated from a sample of its input: the error of
each input channel, weighed by the weights that read it, and that of the weights, weighed by the
size of the channel. A channel that is small beside the others gains by a factor; the weights of the
others lose, since each output channel of a weight has one range.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Dict, List, Tuple, Union

import torch
from mmengine.dist import broadcast_object_list
from torch import Tensor, nn

from mmdet3d_quant.calibration.choose import Unit, search
from mmdet3d_quant.calibration.eager import uncompiled
from mmdet3d_quant.calibration.histogram import Histogram
from mmdet3d_quant.calibration.observe import Forward
from mmdet3d_quant.core.copies import deep_copy
from mmdet3d_quant.core.modes import evaluating, set_mode
from mmdet3d_quant.core.spec import Method, select
from mmdet3d_quant.improve.exact import move_exactly, watched
from mmdet3d_quant.improve.flow import Flow, Step, Value
from mmdet3d_quant.improve.moves import ChannelMove, apply, by_input, num_inputs
from mmdet3d_quant.improve.readers import Reader, Refused, Search, source_of
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.features import values
from mmdet3d_quant.layers.pairs import TRANSPOSED

#: Shares of the range that go to the weights, 0, to the activations, 1, or to both.
ALPHAS = (0.25, 0.5, 0.75, 1.0)
#: Least gain, dB, and largest power of two.
LEAST, LARGEST = 0.1, 10
#: Values of a layer's input that are kept, of one batch.
SAMPLE = 2**17


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
class _Seen:
    """What a layer reads.

    Attributes:
        peak: (channels,), the largest absolute value of each.
        rows: Of each batch (channels, values), a part of what was read.
    """

    peak: Tensor
    rows: List[Tensor] = field(default_factory=list)


#: A layer's source and all that read that; or why there is none that can be changed.
Path = Union[str, Tuple[str, Tuple[Reader, ...]]]


def layers_of(model: nn.Module, patterns: Sequence[str], kind: type = nn.Module) -> list[str]:
    """Lists the layers with a quantized input that patterns name.

    Args:
        model: A model with quantized layers.
        patterns: See :func:`mmdet3d_quant.core.spec.select`.
        kind: Type of the layers.

    Raises:
        ValueError: If a pattern names none.
    """
    known = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLayer)
        and isinstance(layer, kind)
        and layer._input_quantizer.float_reason is None
    ]
    for pattern in patterns:
        if not select(known, pattern):
            what = 'linear layer' if kind is nn.Linear else 'layer'
            raise ValueError(
                f'{pattern!r} names no quantized {what}; these are: {", ".join(known) or "none"}'
            )
    return [name for name in known if any(select([name], pattern) for pattern in patterns)]


def scale_channels(
    model: nn.Module,
    batches: Iterable[Any],
    names: Sequence[str],
    sources: tuple[type, ...],
    alphas: Sequence[float] = ALPHAS,
    forward: Forward | None = None,
) -> Scaled:
    """Moves factors by channel into the layers before, in place; float stays as it is.

    Args:
        model: A model with quantized layers, float weights loaded.
        batches: A few batches; of several processes the first one's decide.
        names: Layers whose inputs shall be scaled.
        sources: Types of layers that may take the factors.
        alphas: Splits that are tried: channel j is divided by
            ``max|X_j| ** alpha / max|W_j| ** (1 - alpha)``, to a power of two.
        forward: As ``calibrate`` takes it.

    Returns:
        :class:`Scaled`.

    Raises:
        ValueError: If there are no batches.
        QuantError: If a layer computes something else afterwards; the model is as before then.
    """
    with uncompiled(model) as plain, set_mode(plain, 'float'), evaluating(plain), torch.no_grad():
        first, paths, seen = _look(plain, batches, names, sources, forward)
        result = [_plan(plain, paths, seen, alphas)]
        broadcast_object_list(result)
        if result[0].moves:
            what = 'layers cannot be scaled by channel'
            move_exactly(plain, result[0].moves, first, forward, what)
    return result[0]


class _Sampling(Flow):
    """A flow that keeps part of what layers read.

    Args:
        model: The model.
        seen: Receives it, by layer.
        names: The layers.
    """

    def __init__(self, model: nn.Module, seen: dict[str, _Seen], names: Sequence[str]) -> None:
        super().__init__(model)
        self._seen, self._wanted = seen, set(names)

    def entering(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Looks at the input of a layer."""
        note = super().entering(module, args, kwargs)
        if self._layer is module and self.names[module] in self._wanted:
            x = values(args[0] if args else next(iter(kwargs.values()))).detach()
            axis = -1 if isinstance(module, nn.Linear) else 1
            rows = x.movedim(axis, 0).flatten(1).float()
            old = self._seen.setdefault(self.names[module], _Seen(rows.new_zeros(len(rows))))
            if rows.shape[1]:
                old.peak = torch.maximum(old.peak, rows.abs().amax(1))
            every = max(1, rows.numel() // SAMPLE) | 1  # odd: not in step with the columns of a map
            old.rows.append(rows[:, ::every].clone())
        return note


def _look(
    model: nn.Module,
    batches: Iterable[Any],
    names: Sequence[str],
    sources: tuple[type, ...],
    forward: Forward | None,
) -> tuple[Any, dict[str, tuple[Path, ...]], dict[str, _Seen]]:
    """Runs batches; returns the first one, the ways to the layers, and what they read."""
    first: Any = None
    paths: dict[str, tuple[Path, ...]] = {}
    seen: dict[str, _Seen] = {}
    readers = [n for n, m in model.named_modules() if isinstance(m, QuantLayer)]
    for number, batch in enumerate(batches):
        first = deep_copy(batch) if number == 0 else first
        flow = watched(model, batch, forward, partial(_Sampling, seen=seen, names=readers))
        for name, found in _paths(flow, set(names), sources).items():
            if paths.setdefault(name, found) != found:
                paths[name] = ('it takes another way in another batch',)
    if first is None:
        raise ValueError('there are no batches to scale channels on')
    for name in names:
        paths.setdefault(name, ('no batch reached it',))
    return first, paths, seen


def _paths(flow: Flow, names: set[str], sources: tuple[type, ...]) -> dict[str, tuple[Path, ...]]:
    known: dict[Step, Path] = {}
    found = {}
    for step in flow.steps:
        name = flow.names.get(step.module, '')
        if step.kind == 'layer' and name in names and step.inputs:
            made = tuple(_makers(flow, step.inputs[0]))
            found[name] = tuple(
                m if isinstance(m, str) else known.setdefault(m, _path(flow, m, sources))
                for m in made
            )
    return found


def _makers(flow: Flow, value: Value) -> Iterator[Step | str]:
    """The layers that make a tensor or, of a concat, its inputs; or why none does."""
    while value.maker is not None and value.maker.kind == 'keeps':
        value = value.maker.inputs[value.maker.source]
    if value.maker is not None and value.maker.kind == 'concat':
        for part in value.maker.inputs:
            yield from _makers(flow, part)
        return
    try:
        yield source_of(flow, value)
    except Refused as err:
        yield str(err)


def _path(flow: Flow, source: Step, sources: tuple[type, ...]) -> Path:
    layer = source.module
    if not isinstance(layer, sources):
        return f'{source.label}, which makes it, is a {type(layer).__name__}'
    if isinstance(layer, TRANSPOSED) and layer.groups > 1:
        return f'{source.label}, which makes it, is transposed and has groups'
    if isinstance(layer, nn.LayerNorm) and layer.weight.dim() > 1:
        return f'{source.label}, which makes it, normalises several axes'
    (value,) = source.outputs
    shape = value.layout.shape
    axis = -1 if isinstance(layer, (nn.Linear, nn.LayerNorm)) and len(shape) > 2 else 1
    try:
        return flow.names[layer], tuple(Search(flow, axis).of(value, (0, shape[axis])))
    except Refused as err:
        return str(err)


def _plan(
    model: nn.Module,
    paths: dict[str, tuple[Path, ...]],
    seen: dict[str, _Seen],
    alphas: Sequence[float],
) -> Scaled:
    """Finds factors, one source after the other; the model stays as it is."""
    layers = dict(model.named_modules())
    sample = {n: torch.cat(s.rows, 1) for n, s in seen.items() if s.peak.any()}
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
    seen: dict[str, _Seen],
    sample: dict[str, Tensor],
    alphas: Sequence[float],
) -> ChannelMove | None:
    rounded = [r for r in readers if r.layer in sample and _is_served(layers[r.layer])]
    if not rounded:
        return None
    first, last = rounded[0].channels or (0, 0)
    # The same tensor is read by all of them, each time the same channels.
    peak = seen[rounded[0].layer].peak[first:last]
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
    weight = _rows(layer, layer.weight.detach().abs().float())
    return weight.amax(1)[slice(*reader.channels or (None,))]


def _rows(layer: Any, weight: Tensor) -> Tensor:
    """(input channels, -1): what reads each input channel."""
    index = by_input(layer, torch.arange(num_inputs(layer), device=weight.device))
    order = index.expand(weight.shape).flatten().argsort(stable=True)
    return weight.flatten()[order].view(num_inputs(layer), -1)


def _error(layer: Any, rows: Tensor, reader: Reader, exponents: Tensor) -> float:
    """Estimates the error of a layer's output, of the output's power, after a move."""
    factor = rows.new_ones(len(rows))
    factor[slice(*reader.channels or (None,))] = exponents.exp2()
    x = rows * factor[:, None]
    weight = layer.weight.detach().float() / by_input(layer, factor)
    spec = layer._input_quantizer.spec
    amax = search([Unit(('',), Method('mse'), Histogram.of(x), spec)])[0]
    step = spec.format.step(torch.tensor(amax))
    noise = (spec.format.round_(x / step) * step - x).square().mean(1)
    power = x.square().mean(1)
    squares = _rows(layer, weight.square()).sum(1)
    error = (noise * squares).sum()
    quantizer = layer._weight_quantizer
    if quantizer.float_reason is None:
        grid = quantizer.spec.format
        steps = grid.step(layer.largest(weight))
        lost = grid.round_(weight / steps) * steps - weight
        error = error + (_rows(layer, lost.square()).sum(1) * power).sum()
    signal = (squares * power).sum()
    return float(error / signal) if signal > 0 else 0.0


def _note(
    layers: dict[str, Any], move: ChannelMove, seen: dict[str, _Seen], sample: dict[str, Tensor]
) -> None:
    """Scales what was seen of the readers' inputs, as the move will."""
    for reader in move.readers:
        if reader.layer in sample:
            part = slice(*reader.channels or (None,))
            seen[reader.layer].peak[part] *= move.factor
            sample[reader.layer][part] *= move.factor[:, None]
