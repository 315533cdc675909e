"""Branches of a concat: which layer gives each its size, and which layers can take that back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

from mmdet3d_quant.improve.flow import Flow, Layout, Step, Value
from mmdet3d_quant.improve.readers import Reader, Refused, Search, Span, source_of
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.join import QuantConcat


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
            source = source_of(flow, value)
            readers = _Search(flow, concat, place, span).all_of(source)
            found.append(Branch(span, flow.names[source.module], readers))
        except Refused as err:
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


class _Search(Search):
    """Search for all readers of a branch.

    Args:
        flow: The flow.
        concat: The concat.
        place: Number of the branch among its inputs.
        span: Channels of the branch in the concat.
    """

    def __init__(self, flow: Flow, concat: Step, place: int, span: Span) -> None:
        super().__init__(flow)
        self._concat, self._place, self._span = concat, place, span

    def all_of(self, source: Step) -> tuple[Reader, ...]:
        """Finds the readers of what a layer makes.

        Raises:
            Refused: If one of them cannot take a factor back.
        """
        found = [reader for value in source.outputs for reader in self.of(value, None)]
        if not any(reader.behind for reader in found):
            raise Refused('no layer reads it behind the concat')
        return tuple(found)

    def through(self, concat: Step, place: int, span: Span | None) -> Span:
        """Finds the channels that have the factor behind a concat."""
        if span is not None:
            return super().through(concat, place, span)
        if concat is not self._concat:
            raise Refused(f'the concat of {concat.label} reads it, too')
        if place != self._place:
            raise Refused(f'it is input {place} of the same concat, too')
        return self._span

    def reader(self, step: Step, layout: Layout, span: Span | None) -> Reader:
        """Describes a layer that reads channels with the factor."""
        if span is not None and getattr(step.module, 'groups', 1) > 1:
            raise Refused(f'{step.label}, which reads it, has groups')
        return super().reader(step, layout, span)
