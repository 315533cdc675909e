"""Equalization of concats: branches of one size, so that all of them fill the grid they share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Tuple

import torch
from mmengine.dist import broadcast_object_list
from torch import Tensor, nn

from mmdet3d_quant.calibration.choose import Unit, search
from mmdet3d_quant.calibration.eager import uncompiled
from mmdet3d_quant.calibration.histogram import Histogram
from mmdet3d_quant.calibration.observe import Forward
from mmdet3d_quant.core.copies import deep_copy
from mmdet3d_quant.core.modes import evaluating, set_mode
from mmdet3d_quant.core.spec import Method, QuantSpec
from mmdet3d_quant.improve.branches import Branch, branches, is_quantized
from mmdet3d_quant.improve.exact import move_exactly, watched
from mmdet3d_quant.improve.flow import Flow, Step
from mmdet3d_quant.improve.moves import Move, weight_part
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.pairs import output_axis

#: Bits by which a branch must fall short to be scaled.
LACKING = 2


@dataclass(frozen=True)
class Left:
    """A branch that is smaller or larger than another and was not scaled.

    Attributes:
        concat: Name of the module that joins it with others.
        branch: Its number among the concat's inputs.
        bits: By how many bits its range and that of the branch it was compared with differ.
        reason: Why it was not scaled.
        refused: Whether it could not be; False where scaling would not help.
    """

    concat: str
    branch: int
    bits: float
    reason: str
    refused: bool = True

    def __str__(self) -> str:
        return (
            f'input {self.branch} of the concat in {self.concat} differs by {self.bits:.1f} bits '
            f'and stays: {self.reason}'
        )


@dataclass(frozen=True)
class Equalization:
    """Result of :func:`equalize_concats`.

    Attributes:
        moves: What was changed.
        left: What differs in size and was not changed, and why.
        num_concats: Concats that are read through quantizers.
    """

    moves: Tuple[Move, ...]
    left: Tuple[Left, ...]
    num_concats: int

    def __str__(self) -> str:
        count = len(self.moves)
        return f'{self.num_concats} concats are quantized; {count} of their inputs equalized'

    def plain(self) -> dict[str, Any]:
        """Describes it in values that JSON takes."""
        return dict(
            num_concats=self.num_concats,
            moves=[dict(move.plain(), text=str(move)) for move in self.moves],
            left=[dict(vars(left), text=str(left)) for left in self.left],
        )


@dataclass
class _Concat:
    """A concat in one forward or several.

    Attributes:
        name: Name of its module; with a number, where that has several.
        branches: Its inputs.
        histograms: What each of them held.
    """

    name: str
    branches: list[Branch]
    histograms: list[Histogram] = field(default_factory=list)


def equalize_concats(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None = None
) -> Equalization:
    """Scales the inputs of concats to one size by powers of two; the float model stays as it is.

    A concat's inputs share a scale, so one that is much smaller than another is left with few
    levels. The factor goes into the weight and bias of the layer that makes the input (a batch
    norm, or a layer without one) and out of the weights that read it behind the concat. An
    input's size is the range that ``mse`` would give it alone. Where dividing the weights would
    cost them more bits than the input gains, both get half. Factors are rounded to the nearest
    power of two. Inputs within :data:`LACKING` bits of each other are left alone, so that a second
    call changes nothing.

    Call it before :func:`mmdet3d_quant.calibrate`: where something is changed, all ranges that the
    model has are dropped.

    Args:
        model: A model with quantized layers, float weights loaded; its weights are changed in
            place.
        batches: A few batches, as ``calibrate`` takes them. Of several processes the first one's
            decide.
        forward: As ``calibrate`` takes it.

    Returns:
        :class:`Equalization`, what was changed and what could not be.

    Raises:
        ValueError: If there are no batches.
        NonFiniteError: If an input of a concat has NaN or infinity.
        QuantError: If a layer computes something else afterwards; the model is as before then.
    """
    with uncompiled(model) as plain, set_mode(plain, 'float'), evaluating(plain), torch.no_grad():
        first: Any = None
        found: dict[str, _Concat] = {}
        for number, batch in enumerate(batches):
            first = deep_copy(batch) if number == 0 else first
            _merge(found, _concats(plain, batch, forward))
        if first is None:
            raise ValueError('there are no batches to equalize concats on')
        result = [_planned(plain, list(found.values()))]
        broadcast_object_list(result)
        if result[0].moves:
            what = 'concats cannot be equalized'
            move_exactly(plain, result[0].moves, first, forward, what)
    return result[0]


def _concats(model: nn.Module, batch: Any, forward: Forward | None) -> list[_Concat]:
    """Runs a batch; returns the concats that quantizers read."""
    seen: list[tuple[Step, list[Histogram]]] = []

    def on_concat(step: Step, tensors: Sequence[Tensor]) -> None:
        seen.append((step, [Histogram.of(x) for x in tensors]))

    flow = watched(model, batch, forward, lambda m: Flow(m, on_concat))
    counts: dict[str, int] = {}
    result = []
    for step, histograms in seen:
        name = flow.names[step.module] or type(step.module).__name__
        counts[name] = counts.get(name, 0) + 1
        name += '' if counts[name] == 1 else f' (number {counts[name]})'
        if is_quantized(step):
            for place, histogram in enumerate(histograms):
                histogram.name = f'input {place} of the concat in {name}'
                histogram.require_finite()
            result.append(_Concat(name, branches(flow, step), histograms))
    return result


def _merge(found: dict[str, _Concat], more: list[_Concat]) -> None:
    """Adds the concats of another batch; branches that took another way there are refused."""
    for concat in more:
        known = found.setdefault(concat.name, concat)
        if known is concat:
            continue
        same = len(known.branches) == len(concat.branches)
        for place, branch in enumerate(known.branches):
            if not same or concat.branches[place] != branch:
                reason = branch.problem or 'it takes another way in another batch'
                known.branches[place] = Branch(branch.channels, problem=reason)
            if same:
                known.histograms[place].merge(concat.histograms[place])


def _planned(model: nn.Module, concats: list[_Concat]) -> Equalization:
    layers = dict(model.named_modules())
    moves: list[Move] = []
    left: list[Left] = []
    for concat in concats:
        method, spec = Method.parse('mse'), QuantSpec()
        sizes = search([Unit((h.name,), method, h, spec) for h in concat.histograms])
        live = [i for i, size in enumerate(sizes) if size > 0]
        fixed = [i for i in live if concat.branches[i].problem]
        largest = max(fixed or live, key=lambda i: sizes[i], default=0)
        for i in live:
            branch = concat.branches[i]
            bits = math.log2(sizes[largest] / sizes[i])
            if abs(bits) < LACKING:
                continue
            room = _room(layers, branch, concat.branches[largest].channels)
            exponent = _exponent(bits, room)
            if branch.problem:
                left.append(Left(concat.name, i, abs(bits), branch.problem))
            elif not exponent:
                reason = 'the weights that read it would lose as much as it gains'
                left.append(Left(concat.name, i, abs(bits), reason, refused=False))
            else:
                moves.append(Move(concat.name, i, branch.source, branch.readers, exponent))
    return Equalization(tuple(moves), tuple(left), len(concats))


def _exponent(bits: float, room: float) -> int:
    """Bits that a branch gets: all that it lacks, or half of what it and its weights lack."""
    sign = 1 if bits > 0 else -1
    half = math.inf if math.isinf(room) else (abs(bits) + sign * room) / 2
    steps = round(min(abs(bits), half))
    return sign * steps if steps >= LACKING else 0


def _room(layers: dict[str, nn.Module], branch: Branch, other: tuple[int, int]) -> float:
    """By how many bits the weights behind a branch are larger than those behind another one.

    A weight has a range per output channel: the median of those is taken. Float weights, and
    those that read the branch alone, lose nothing however small they are.

    Returns:
        The bits; infinity where no weight can lose any.
    """
    least = math.inf
    for reader in branch.readers:
        layer = layers[reader.layer]
        quantized = isinstance(layer, QuantLayer) and not layer._weight_quantizer.float_reason
        if reader.channels is None or not quantized:
            continue
        shift = reader.channels[0] - branch.channels[0]
        axis = output_axis(layer)
        own, its = (
            weight_part(layer, channels).detach().abs().transpose(0, axis).flatten(1).amax(1)
            for channels in (reader.channels, (other[0] + shift, other[1] + shift))
        )
        ratios = (own / its)[(own > 0) & (its > 0)]
        if len(ratios):
            least = min(least, math.log2(float(ratios.double().median())))
    return least
