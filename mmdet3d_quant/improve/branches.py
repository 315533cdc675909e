"""Branches of a concat: which layer gives each its size, and which layers can take that back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

from torch import nn

from mmdet3d_quant.improve.flow import NORMS, Flow, Layout, Step, Value
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.join import QuantConcat
from mmdet3d_quant.layers.sparse import SPARSE_CONVS

#: First and last + 1 channel.
Span = Tuple[int, int]


@dataclass(frozen=True)
class Reader:
    """Part of a weight that reads a branch.

    Attributes:
        layer: Name of a convolution or linear layer.
        channels: The branch's input channels, first and last + 1; None means all.
        behind: Whether it reads the concat, and not the branch alone.
    """

    layer: str
    channels: Span | None
    behind: bool


@dataclass(frozen=True)
class Branch:
    """One input of a concat.

    Attributes:
        channels: Its place in the concat.
        source: Name of the layer whose weight and bias give it its size.
        readers: All that read what the source makes.
        problem: Why its size cannot be changed; the other two are empty then.
    """

    channels: Span
    source: str = ''
    readers: Tuple[Reader, ...] = ()
    problem: str = ''


class _Refused(Exception):
    """The size of a branch cannot be changed."""


def branches(flow: Flow, concat: Step) -> list[Branch]:
    """Finds of every input of a concat what can change its size and leave the model as it is.

    Between its source, a layer, and the layers that read it, only operators are passed for which a
    positive factor of the input is one of the output.

    Args:
        flow: A closed flow.
        concat: One of its steps.

    Returns:
        One per input, in order.
    """
    found, start = [], 0
    for place, value in enumerate(concat.inputs):
        layout = next(x for step, at, x in value.reads if step is concat and at == place)
        span = start, start + layout.shape[1]
        try:
            source = _source(flow, value)
            readers = _Search(flow, concat, place, span).all_of(source)
            found.append(Branch(span, flow.names[source.module], readers))
        except _Refused as err:
            found.append(Branch(span, problem=str(err)))
        start = span[1]
    return found


def is_quantized(concat: Step) -> bool:
    """Tells whether a concat is read through a quantizer that is not kept float."""
    if isinstance(concat.module, QuantConcat):
        return concat.module._input_quantizer.float_reason is None
    return any(_is_read_quantized(value) for value in concat.outputs)


def _is_read_quantized(value: Value) -> bool:
    for step, place, _ in value.reads:
        if step.kind == 'layer' and isinstance(step.module, QuantLayer):
            if step.module._input_quantizer.float_reason is None:
                return True
        elif step.kind == 'concat' or (step.kind == 'keeps' and step.source == place):
            if any(map(_is_read_quantized, step.outputs)):
                return True
    return False


def _source(flow: Flow, value: Value) -> Step:
    """The layer that a tensor gets its size from."""
    while value.maker is not None and value.maker.kind == 'keeps':
        value = value.maker.inputs[value.maker.source]
    step = value.maker
    if step is None:
        raise _Refused('it is an input of the model, or made by what was not seen')
    if step.kind != 'layer':
        raise _Refused(f'it is made by {step.label}, which is no layer with a weight and a bias')
    if step.module in flow.problems:
        raise _Refused(f'{step.label}: {flow.problems[step.module]}')
    if step.module.weight is None:
        raise _Refused(f'{step.label} has no weight')
    return step


class _Search:
    """Search for all readers of a branch.

    Args:
        flow: The flow.
        concat: The concat.
        place: Number of the branch among its inputs.
        span: Channels of the branch in the concat.
    """

    def __init__(self, flow: Flow, concat: Step, place: int, span: Span) -> None:
        self._flow, self._concat, self._place, self._span = flow, concat, place, span

    def all_of(self, source: Step) -> tuple[Reader, ...]:
        """Finds the readers of what a layer makes.

        Raises:
            _Refused: If one of them cannot take a factor back.
        """
        found = [reader for value in source.outputs for reader in self._of(value, None)]
        if not any(reader.behind for reader in found):
            raise _Refused('no layer reads it behind the concat')
        return tuple(found)

    def _of(self, value: Value, span: Span | None) -> list[Reader]:
        """Readers of a tensor of which some channels, or all, have the factor."""
        if value.kept:
            raise _Refused(f'what {_label(value)} makes is kept or returned')
        found: list[Reader] = []
        for step, place, layout in value.reads:
            if span is not None and not layout.has_channels_of(value.layout):
                raise _Refused(f'{step.label} reads the concat with other axes')
            if step.kind == 'keeps' and place == step.source:
                if span is not None and not step.by_channel:
                    raise _Refused(f'{step.label} may move channels of the concat')
                behind = [r for made in step.outputs for r in self._of(made, span)]
            elif step.kind == 'concat':
                inside = self._through(step, place, span)
                behind = [r for made in step.outputs for r in self._of(made, inside)]
            elif step.kind == 'layer' and not isinstance(step.module, NORMS):
                behind = [self._reader(step, layout, span)]
            else:
                raise _Refused(f'{step.label} reads it, too, and no weight takes a factor back')
            found += behind
        return found

    def _through(self, concat: Step, place: int, span: Span | None) -> Span:
        """Channels that have the factor behind a concat."""
        if span is None and concat is not self._concat:
            raise _Refused(f'the concat of {concat.label} reads it, too')
        if span is None and place != self._place:
            raise _Refused(f'it is input {place} of the same concat, too')
        if span is None:
            return self._span
        sizes = [
            next(x for step, at, x in value.reads if step is concat and at == number).shape[1]
            for number, value in enumerate(concat.inputs[:place])
        ]
        return span[0] + sum(sizes), span[1] + sum(sizes)

    def _reader(self, step: Step, layout: Layout, span: Span | None) -> Reader:
        layer = step.module
        if layer in self._flow.problems:
            raise _Refused(f'{step.label}, which reads it: {self._flow.problems[layer]}')
        if span is not None:
            if getattr(layer, 'groups', 1) > 1:
                raise _Refused(f'{step.label}, which reads it, has groups')
            if len(layout.shape) != _axes(layer):
                raise _Refused(f'{step.label} reads a tensor of {len(layout.shape)} axes')
        return Reader(self._flow.names[layer], span, span is not None)


def _axes(layer: nn.Module) -> int:
    """Axes of an input whose axis 1 is the channels."""
    sparse_or_linear = isinstance(layer, (nn.Linear, *SPARSE_CONVS))
    return 2 if sparse_or_linear else layer.weight.dim()  # type: ignore[union-attr, operator]


def _label(value: Value) -> str:
    return value.maker.label if value.maker else 'something'
