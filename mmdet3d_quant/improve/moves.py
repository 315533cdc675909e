"""Moves of a factor from one layer to those that read it, as plain data, and their application."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Tuple

import torch
from torch import Tensor, nn

from mmdet3d_quant.improve.branches import Reader
from mmdet3d_quant.layers.pairs import input_axis


@dataclass(frozen=True)
class Move:
    """A power of two that goes from the layers that read a branch into the one that makes it.

    Attributes:
        concat: Name of the module that joins the branch with others.
        branch: Number of the branch among the concat's inputs.
        source: Name of the layer whose weight and bias are multiplied by ``2 ** exponent``.
        readers: Parts of weights that are divided by it.
        exponent: The power.
    """

    concat: str
    branch: int
    source: str
    readers: Tuple[Reader, ...]
    exponent: int

    def __str__(self) -> str:
        factor = f'{2.0**self.exponent:g}'
        parts = ', '.join(
            reader.layer + ('' if reader.channels is None else f'[:, {_slice(reader.channels)}]')
            for reader in self.readers
        )
        return (
            f'input {self.branch} of the concat in {self.concat}: '
            f'{self.source} x {factor}, {parts} / {factor}'
        )

    def plain(self) -> dict[str, Any]:
        """Describes the move in values that JSON takes."""
        readers = [
            dict(layer=r.layer, channels=r.channels and list(r.channels)) for r in self.readers
        ]
        return dict(
            concat=self.concat,
            branch=self.branch,
            source=self.source,
            factor=2.0**self.exponent,
            readers=readers,
        )


@torch.no_grad()
def apply(model: nn.Module, moves: Iterable[Move], back: bool = False) -> None:
    """Moves factors, in place.

    Args:
        model: The model that the moves were found on.
        moves: The moves.
        back: Take them back instead.
    """
    layers = dict(model.named_modules())
    for move in moves:
        factor = 2.0 ** (-move.exponent if back else move.exponent)
        for tensor in (layers[move.source].weight, layers[move.source].bias):
            if tensor is not None:
                tensor.mul_(factor)  # type: ignore[operator]
        for reader in move.readers:
            weight_part(layers[reader.layer], reader.channels).div_(factor)


def weight_part(layer: nn.Module, channels: tuple[int, int] | None) -> Tensor:
    """Selects the part of a weight that meets some input channels, as a view; None means all."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if channels is None:
        return weight
    return weight.narrow(input_axis(layer), channels[0], channels[1] - channels[0])


def _slice(channels: tuple[int, int]) -> str:
    return f'{channels[0]}:{channels[1]}'
