"""Moves of a factor from one layer to those that read it, as plain data, and their application."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Tuple, Union

import torch
from torch import Tensor, nn

from mmdet3d_quant.improve.readers import Reader
from mmdet3d_quant.layers.pairs import TRANSPOSED, input_axis, output_axis


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

    @property
    def factor(self) -> Tensor:
        """float32 (): what the source is multiplied by."""
        return torch.tensor(2.0**self.exponent)

    def __str__(self) -> str:
        factor = f'{2.0**self.exponent:g}'
        parts = ', '.join(map(_part, self.readers))
        return (
            f'input {self.branch} of the concat in {self.concat}: '
            f'{self.source} x {factor}, {parts} / {factor}'
        )

    def plain(self) -> dict[str, Any]:
        """Describes the move in values that JSON takes."""
        return dict(
            concat=self.concat,
            branch=self.branch,
            source=self.source,
            factor=2.0**self.exponent,
            readers=_plain(self.readers),
        )


@dataclass(frozen=True)
class ChannelMove:
    """Powers of two, one a channel, that go from the readers of a layer into that layer.

    Attributes:
        source: Name of the layer whose output channels are multiplied by ``2 ** exponents``.
        readers: Parts of weights whose input channels are divided by them.
        exponents: The powers.
        gain: By how much the error of the readers' outputs shrinks, estimated, in dB.
    """

    source: str
    readers: Tuple[Reader, ...]
    exponents: Tuple[int, ...]
    gain: float

    @property
    def factor(self) -> Tensor:
        """float32 (channels,): what the source is multiplied by."""
        return torch.tensor(self.exponents).float().exp2()

    def __str__(self) -> str:
        changed = sum(map(bool, self.exponents))
        low, high = 2.0 ** min(self.exponents), 2.0 ** max(self.exponents)
        return (
            f'{self.source} x {low:g} to {high:g} ({changed} of {len(self.exponents)} channels), '
            f'out of {", ".join(map(_part, self.readers))}: {self.gain:.1f} dB'
        )

    def plain(self) -> dict[str, Any]:
        """Describes the move in values that JSON takes."""
        factors = self.factor.tolist()
        return dict(source=self.source, factors=factors, readers=_plain(self.readers))


AnyMove = Union[Move, ChannelMove]


@torch.no_grad()
def apply(model: nn.Module, moves: Iterable[AnyMove], back: bool = False) -> None:
    """Moves factors, in place.

    Args:
        model: The model that the moves were found on.
        moves: The moves.
        back: Take them back instead.
    """
    layers = dict(model.named_modules())
    for move in moves:
        source = layers[move.source]
        factor = move.factor.to(source.weight)  # type: ignore[arg-type]
        factor = 1 / factor if back else factor
        source.weight.mul_(_by_output(source, factor))  # type: ignore[operator]
        if source.bias is not None:
            source.bias.mul_(factor)  # type: ignore[operator]
        for reader in move.readers:
            layer = layers[reader.layer]
            if factor.dim() == 0:
                weight_part(layer, reader.channels).div_(factor)
            else:
                layer.weight.div_(by_input(layer, spread(layer, factor, reader)))  # type: ignore[operator]


def weight_part(layer: nn.Module, channels: tuple[int, int] | None) -> Tensor:
    """Selects the part of a weight that meets some input channels, as a view; None means all."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if channels is None:
        return weight
    return weight.narrow(input_axis(layer), channels[0], channels[1] - channels[0])


def num_inputs(layer: nn.Module) -> int:
    """Counts the input channels of a convolution or linear layer."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # type: ignore[return-value]


def by_input(layer: nn.Module, row: Tensor) -> Tensor:
    """Views a number per input channel so that it meets the weight of a layer.

    Args:
        layer: A convolution, with or without groups, or a linear layer.
        row: (input channels,).

    Returns:
        Tensor that broadcasts to the shape of the weight.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    groups = 1 if isinstance(layer, TRANSPOSED) else getattr(layer, 'groups', 1)
    if groups == 1:
        return row.view([-1 if d == input_axis(layer) else 1 for d in range(weight.dim())])
    rows = row.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


def spread(layer: nn.Module, factor: Tensor, reader: Reader) -> Tensor:
    """Spreads a reader's factors over what its layer reads.

    Args:
        layer: The layer.
        factor: One per channel of the reader.
        reader: Which of the layer's input channels those are.

    Returns:
        (input channels,), 1 for the other channels.
    """
    row = factor.new_ones(num_inputs(layer))
    row[reader.part] = factor
    return row


def _by_output(layer: nn.Module, row: Tensor) -> Tensor:
    dims = layer.weight.dim()  # type: ignore[union-attr, operator]
    if row.dim() == 0 or dims == 1:
        return row
    return row.view([-1 if d == output_axis(layer) else 1 for d in range(dims)])


def _plain(readers: Iterable[Reader]) -> list[dict[str, Any]]:
    return [dict(layer=r.layer, channels=r.channels and list(r.channels)) for r in readers]


def _part(reader: Reader) -> str:
    if reader.channels is None:
        return reader.layer
    return f'{reader.layer}[:, {reader.channels[0]}:{reader.channels[1]}]'
