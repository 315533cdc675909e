"""Flips of single weights and of pairs, up or down, that lower the squared error of a layer.

A layer is linear in its weights, so its squared error is a quadratic form of them: with the sums of
products of what it reads, each flip is judged exactly and without running the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet3d_quant.improve.crops import Samples
from mmdet3d_quant.improve.relaxed import Relaxed

#: Crops that are looked at together.
CROPS = 4
#: Of a pair one weight is among so many whose flips alone cost least.
PARTNERS = 16
#: Least share of an output channel's error that a flip has to take off.
LEAST_GAIN = 1e-6


def polish(
    chain: nn.Sequential,
    exact: nn.Sequential,
    relaxed: Mapping[str, Relaxed],
    data: Samples,
    nearest: float,
) -> float:
    """Flips weights of the layers of a block, one layer after the other, where the block gains.

    Convolutions in 2D that pad with zeros and linear layers are looked at. Flips are chosen by the
    error of the layer's own output on the crops learned from, beginning at several roundings; they
    stay if the error of the block on the judged crops is less.

    Args:
        chain: The block; its layers have the rounded weights.
        exact: The block of the float model.
        relaxed: Its layers that are learned.
        data: Crops.
        nearest: The block's error on the judged crops with rounding to nearest, where all begins if
            what was learned is not better.

    Returns:
        The error afterwards.
    """
    error = data.error(chain)
    if not error < nearest:
        error = nearest
        for r in relaxed.values():
            _set(r, r.nearest())
    for r in relaxed.values():
        if not _is_served(r.layer):
            continue
        twin = _twin(chain, exact, r.layer)
        pairs = _seen(chain, exact, r.layer, twin, data.learned(CROPS))
        known = r.ups()
        _set(r, _flipped(r, *_products(r.layer, pairs)))
        new = data.error(chain)
        if new < error:
            error = new
        else:
            _set(r, known)
    return error


def _set(r: Relaxed, ups: Tensor) -> None:
    r.choose(ups)
    r.layer.weight.copy_(r.rounded())


def _is_served(layer: Any) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == 'zeros' and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def _twin(chain: nn.Module, exact: nn.Module, layer: nn.Module) -> nn.Module:
    names = {module: name for name, module in chain.named_modules()}
    return exact.get_submodule(names[layer])


def _seen(
    chain: nn.Module, exact: nn.Module, layer: Any, twin: Any, crops: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields what a layer reads, rounded, and what it should give, less its bias."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda m, args: seen.append(args[0])),
        twin.register_forward_hook(lambda m, args, output: seen.append(output)),
    ]
    try:
        for x, z in crops:
            seen.clear()
            chain(x)
            exact(z)
            read, wanted = seen
            if layer.bias is not None:
                linear = isinstance(layer, nn.Linear)
                wanted = wanted - (layer.bias if linear else layer.bias.view(-1, 1, 1))
            yield layer._input_quantizer(read), wanted
    finally:
        for handle in handles:
            handle.remove()


def _products(layer: Any, pairs: Any) -> tuple[Tensor, Tensor]:
    """Sums the products of inputs with inputs and with wanted outputs.

    Returns:
        float64 (groups, weights, weights) and (groups, outputs, weights), for the weights of an
        output channel.
    """
    groups = getattr(layer, 'groups', 1)
    square: Any = 0.0
    mixed: Any = 0.0
    for x, wanted in pairs:
        if isinstance(layer, nn.Linear):
            rows, wanted = x.flatten(0, -2).T[None], wanted.flatten(0, -2).T[None]
        else:
            rows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            rows = rows.transpose(0, 1).flatten(1).unflatten(0, (groups, -1))
            wanted = wanted.transpose(0, 1).flatten(1).unflatten(0, (groups, -1))
        square = square + (rows @ rows.mT).double()
        mixed = mixed + (wanted @ rows.mT).double()
    return square, mixed


def _flipped(r: Relaxed, square: Tensor, mixed: Tensor) -> Tensor:
    """Finds which weights go up, by output channel the best of several descents; weight's shape."""
    shape = r.layer.weight.shape
    low, step, free = (t.expand(shape).flatten(1).unflatten(0, mixed.shape[:2]) for t in r.grid())
    starts = [up.flatten(1).unflatten(0, mixed.shape[:2]) for up in r.starts()]
    result = []
    for g in range(len(square)):
        group = low[g].double() * step[g].double(), step[g].double(), free[g]
        ends = [_descend(up[g], group, square[g], mixed[g]) for up in starts]
        least = torch.stack([error for _, error in ends]).argmin(0)
        result.append(torch.stack([end for end, _ in ends])[least, torch.arange(len(least))])
    return torch.cat(result).view(shape)


def _descend(
    up: Tensor, group: Sequence[Tensor], square: Tensor, mixed: Tensor
) -> tuple[Tensor, Tensor]:
    """Flips in each output channel what lowers its error most, for as long as something does.

    Args:
        up: bool (outputs, weights), where to begin.
        group: Lower numbers, steps and whether a weight is free, each of the shape of ``up``.
        square: (weights, weights), products of inputs.
        mixed: (outputs, weights), products with the wanted outputs.

    Returns:
        ``up`` at the end, and by output channel the error, but for a constant.
    """
    low, step, free = group
    up, size = up.clone(), square.diagonal()
    weight = low + up * step
    slope = weight @ square - mixed
    least = LEAST_GAIN * (weight * slope).sum(1).abs().clamp_min(1e-30)
    for _ in range(4 * up.shape[1]):
        move = torch.where(up, -step, step)
        cost = (move * (2 * slope + move * size)).masked_fill(~free, torch.inf)
        best, *places = cost.min(1)
        if not (best < -least).any():
            best, *places = _best_pair(cost, move, square)
        rows = (best < -least).nonzero()[:, 0]
        if not len(rows):
            break
        for place in places:
            at = place[rows]
            slope[rows] += move[rows, at, None] * square[at]
            up[rows, at] = ~up[rows, at]
    weight = low + up * step
    return up, (weight * (weight @ square - 2 * mixed)).sum(1)


def _best_pair(cost: Tensor, move: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Finds by output channel the pair of flips that costs least: its cost and both places."""
    near = cost.topk(min(PARTNERS, cost.shape[1]), 1, largest=False).indices
    found = []
    for i, j in enumerate(near.unbind()):
        both = cost[i, j, None] + cost[i] + 2 * move[i, j, None] * move[i] * square[j]
        both.scatter_(1, j[:, None], torch.inf)
        at = both.argmin()
        found.append((both.view(-1)[at], j[at // both.shape[1]], at % both.shape[1]))
    best, first, second = (torch.stack(part) for part in zip(*found))
    return best, first, second
