"""Inputs to run a module on once, when nobody gives any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.core.macs import weighted

#: Height and width of the maps that are tried.
SIZES = (64, 128, 224)
#: The same by number of dimensions.
SIDES: dict[int, list[tuple[int, ...]]] = {
    1: [(64,)],
    2: [(size, size) for size in SIZES],
    3: [(16, 16, height) for height in (8, 12, 16)],
}


def given_example(shapes: Sequence[Any]) -> list[Any]:
    """Draws tensors of the shapes in a config.

    Args:
        shapes: By argument of the forward: a shape such as ``(1, 3, 64, 64)``, or a list of them.

    Returns:
        list of float32 tensors, and of lists of them.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(shapes, (list, tuple)) or not shapes:
        raise ValueError(
            f'example expects a shape per argument, such as [(1, 3, 64, 64)], got {shapes!r}'
        )
    if all(isinstance(n, int) for n in shapes):
        raise ValueError(f'example expects a shape per argument: write [{tuple(shapes)}]')
    rng = torch.Generator().manual_seed(0)
    return [_drawn(shape, rng) for shape in shapes]


def examples(model: nn.Module, channels: Any = None) -> Iterator[list[Any]]:
    """Draws arguments that a forward may take, likely ones first.

    Args:
        model: A backbone (one map), a neck (a list of maps, each half the size of the one before),
            or a head (either).
        channels: Of the maps; by default as its ``in_channels`` says, or its first layer.

    Yields:
        list of float32 tensors, and of lists of them.
    """
    channels = getattr(model, 'in_channels', None) if channels is None else channels
    if isinstance(channels, (list, tuple)) and channels:
        orders = (list(channels), list(channels)[::-1])  # some count from the smallest map
        for size, order in product(SIZES, orders):
            yield given_example([[(1, c, size >> i, size >> i) for i, c in enumerate(order)]])
        return
    first = next(iter(weighted(model).values()), None)
    levels = getattr(model, 'num_levels', None) or len(getattr(model, 'strides', None) or [0])
    for alone in _single(channels, first):
        pyramid = [(*alone[:2], *(max(n >> i, 1) for n in alone[2:])) for i in range(levels)]
        as_list = hasattr(model, 'forward_single') or hasattr(model, 'num_levels')
        for shapes in ([pyramid], [alone]) if as_list else ([alone], [[alone]]):
            yield given_example(shapes)


def _single(channels: Any, layer: Any) -> list[tuple[int, ...]]:
    """Shapes of one map; none if nothing tells its channels."""
    if isinstance(layer, nn.Linear):
        return [(1, 16, layer.in_features)]
    weight = getattr(layer, 'weight', None)
    dims = weight.dim() - 2 if isinstance(weight, Tensor) else 2
    likely = (channels, getattr(layer, 'in_channels', None), 3)
    known = [c for c in likely if isinstance(c, int)]
    return [(1, c, *sides) for c in dict.fromkeys(known) for sides in SIDES.get(dims, ())]


def _drawn(shape: Any, rng: torch.Generator) -> Any:
    if isinstance(shape, (list, tuple)) and shape and all(isinstance(n, int) for n in shape):
        return torch.randn(*shape, generator=rng)
    if isinstance(shape, (list, tuple)) and shape:
        return [_drawn(item, rng) for item in shape]
    raise ValueError(f'example: {shape!r} is no shape, nor a list of shapes')
