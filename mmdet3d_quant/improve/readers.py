"""Which weights read what a layer makes, and so can take a factor of it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

from torch import nn

from mmdet3d_quant.improve.flow import NORMS, Flow, Layout, Step, Value
from mmdet3d_quant.layers.sparse import SPARSE_CONVS

#: First and last + 1 channel.
Span = Tuple[int, int]


@dataclass(frozen=True)
class Reader:
    """Part of a weight that reads a tensor.

    Attributes:
        layer: Name of a convolution or linear layer.
        channels: The tensor's input channels, first and last + 1; None means all.
        behind: Whether it reads them by their numbers, as those of a concat, and not all alike.
    """

    layer: str
    channels: Span | None
    behind: bool

    @property
    def part(self) -> slice:
        """The channels as an index."""
        return slice(*self.channels) if self.channels else slice(None)


class Refused(Exception):
    """A factor cannot be moved; says why."""


def source_of(flow: Flow, value: Value) -> Step:
    """Finds the layer that a tensor gets its size from.

    Args:
        flow: A closed flow.
        value: One of its values.

    Returns:
        The step of that layer.

    Raises:
        Refused: If there is none whose weight and bias may be changed.
    """
    step = value.origin
    if step is None:
        raise Refused('it is an input of the model, or made by what was not seen')
    if step.kind != 'layer':
        raise Refused(f'it is made by {step.label}, which is no layer with a weight and a bias')
    if step.module in flow.problems:
        raise Refused(f'{step.label}: {flow.problems[step.module]}')
    if step.module.weight is None:
        raise Refused(f'{step.label} has no weight')
    return step


class Search:
    """Search for the layers that read a tensor, through all that hands a positive factor on.

    Args:
        flow: A closed flow.
        axis: Which axis has the channels: 1, or -1, the last one, as of tokens.
    """

    def __init__(self, flow: Flow, axis: int = 1) -> None:
        self._flow, self._axis = flow, axis

    def of(self, value: Value, span: Span | None) -> list[Reader]:
        """Finds the readers of a tensor.

        Args:
            value: The tensor.
            span: Channels that have a factor, each its own; None: all have the same.

        Returns:
            All of them.

        Raises:
            Refused: If one of them cannot take a factor back.
        """
        if value.kept:
            raise Refused(f'what {_label(value)} makes is kept or returned')
        found: list[Reader] = []
        for step, place, layout in value.reads:
            if span is not None and not layout.has_channels_of(value.layout, self._axis):
                raise Refused(f'{step.label} reads {_what(value)} with other axes')
            if step.kind == 'keeps' and place == step.source:
                if span is not None and self._axis not in step.channels_at:
                    raise Refused(f'{step.label} may move channels of {_what(value)}')
                behind = [r for made in step.outputs for r in self.of(made, span)]
            elif step.kind == 'concat' and self._axis == 1:
                inside = self.through(step, place, span)
                behind = [r for made in step.outputs for r in self.of(made, inside)]
            elif step.kind == 'layer' and not isinstance(step.module, NORMS):
                behind = [self.reader(step, layout, span)]
            else:
                raise Refused(f'{step.label} reads it, too, and no weight takes a factor back')
            found += behind
        return found

    def through(self, concat: Step, place: int, span: Span | None) -> Span:
        """Finds the channels that have a factor behind a concat.

        Args:
            concat: The concat.
            place: Number of the input that has the factor.
            span: Channels of that input.
        """
        assert span is not None
        sizes = [
            next(x for step, at, x in value.reads if step is concat and at == number).shape[1]
            for number, value in enumerate(concat.inputs[:place])
        ]
        return span[0] + sum(sizes), span[1] + sum(sizes)

    def reader(self, step: Step, layout: Layout, span: Span | None) -> Reader:
        """Describes a layer that reads a tensor.

        Args:
            step: The layer.
            layout: What it reads.
            span: Channels that have a factor, see :meth:`of`.
        """
        layer = step.module
        if layer in self._flow.problems:
            raise Refused(f'{step.label}, which reads it: {self._flow.problems[layer]}')
        if span is not None and self._axis == 1 and len(layout.shape) != _axes(layer):
            raise Refused(f'{step.label} reads a tensor of {len(layout.shape)} axes')
        if self._axis == -1 and not isinstance(layer, nn.Linear):
            raise Refused(f'{step.label}, which reads it, is no linear layer')
        return Reader(self._flow.names[layer], span, span is not None)


def _axes(layer: nn.Module) -> int:
    """Axes of an input whose axis 1 is the channels."""
    sparse_or_linear = isinstance(layer, (nn.Linear, *SPARSE_CONVS))
    return 2 if sparse_or_linear else layer.weight.dim()  # type: ignore[union-attr, operator]


def _label(value: Value) -> str:
    return value.maker.label if value.maker else 'something'


def _what(value: Value) -> str:
    return 'the concat' if value.maker and value.maker.kind == 'concat' else _label(value)
