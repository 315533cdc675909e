"""Factors by channel: who makes and who reads a tensor, and what moves between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.dist import broadcast_object_list
from torch import nn

from mmdet3d_quant.calibration.eager import uncompiled
from mmdet3d_quant.calibration.observe import Forward
from mmdet3d_quant.core.copies import deep_copy
from mmdet3d_quant.core.modes import evaluating, set_mode
from mmdet3d_quant.core.spec import select_all
from mmdet3d_quant.improve.channel_factors import ALPHAS, Path, Scaled, Seen, plan_factors
from mmdet3d_quant.improve.exact import move_exactly, watched
from mmdet3d_quant.improve.flow import Flow, Step, Value
from mmdet3d_quant.improve.readers import Refused, Search, source_of
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.features import values
from mmdet3d_quant.layers.pairs import TRANSPOSED

#: Values of a layer's input that are kept, of one batch.
SAMPLE = 2**15


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
    what = 'quantized linear layer' if kind is nn.Linear else 'quantized layer'
    chosen = set(select_all(known, patterns, what))
    return [name for name in known if name in chosen]


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
        result = [plan_factors(plain, paths, seen, alphas)]
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

    def __init__(self, model: nn.Module, seen: dict[str, Seen], names: Sequence[str]) -> None:
        super().__init__(model)
        self._seen, self._wanted = seen, set(names)

    def entering(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Looks at the input of a layer."""
        note = super().entering(module, args, kwargs)
        if self._layer is module and self.names[module] in self._wanted:
            x = values(args[0] if args else next(iter(kwargs.values()))).detach()
            axis = -1 if isinstance(module, nn.Linear) else 1
            rows = x.movedim(axis, 0).flatten(1).float()
            old = self._seen.setdefault(self.names[module], Seen(rows.new_zeros(len(rows))))
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
) -> tuple[Any, dict[str, tuple[Path, ...]], dict[str, Seen]]:
    """Runs batches; returns the first one, the ways to the layers, and what they read."""
    first: Any = None
    paths: dict[str, tuple[Path, ...]] = {}
    seen: dict[str, Seen] = {}
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
    step = value.origin
    if step is not None and step.kind == 'concat':
        for part in step.inputs:
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
