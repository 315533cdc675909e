"""From a float module to a quantized one, in place; of a detector, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import torch
from mmdet3d.registry import MODELS
from torch import nn

from mmdet3d_quant.core.macs import weighted
from mmdet3d_quant.core.modes import keep_float, quantizers
from mmdet3d_quant.core.ties import fed_by
from mmdet3d_quant.layers.arrange import find_ties, insert_joins
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.joining import make_joining
from mmdet3d_quant.layers.meetings import Seen, watch_meetings
from mmdet3d_quant.layers.swap import swap_layers
from mmdet3d_quant.models.example import examples, given_example

UNREACHED = 'its forward does not call it'
FOREIGN = 'its weight is read by something else, too'
#: Parts of a detector that stay float, by pattern of their name, and why.
FLOAT_PARTS = {
    '*voxel_encoder': 'the offsets of the points in a cell are small beside the coordinates, and '
    'would be lost in steps of INT8',
    'pts_fusion_layer': 'it samples features by point: indexing, and a few small layers',
    '*roi_head': 'it works on regions of varying number, outside of the exported files',
}
#: Settings with which a type that is written for a part quantizes all that it can.
WHOLE = {name: dict(quantize_downsample=True) for name in ('DepthLSSTransform', 'LSSTransform')}


@dataclass(frozen=True)
class Converted:
    """What became of a module.

    Attributes:
        left: Reason by name of each layer that stays float.
        returned: What the module returned when it was run; None if it was not.
    """

    left: dict[str, str]
    returned: Any = None


def quantize(
    model: nn.Module, joins: bool | str = True, inputs: Iterable[Sequence[Any]] = ()
) -> Converted:
    """Quantizes a float module in place.

    Args:
        model: Any module that runs on random maps.
        joins: Whether adds and concats get quantizers; ``'all'``: see ``insert_joins``.
        inputs: Arguments of its forward to try, one after the other.

    Returns:
        :class:`Converted`.

    Raises:
        ValueError: If it is of a quantized type, nothing in it can be quantized, or it cannot be
            run.
    """
    kind = type(model).__name__
    if is_quant_type(model):
        raise ValueError(f'{kind} is a quantized type already: write type={kind!r}')
    layers = weighted(model)
    left = swap_layers(model)
    if len(left) == len(layers):
        reasons = '; '.join(dict.fromkeys(left.values())) or 'it has no layers with weights'
        raise ValueError(f'nothing in {kind} can be quantized: {reasons}')
    seen = _watch(model, inputs)
    for name, layer in layers.items():
        if isinstance(layer, QuantLayer):
            if name not in seen.reached or name in seen.foreign:
                left[name] = FOREIGN if name in seen.foreign else UNREACHED
    for name, reason in left.items():
        _keep_layer_float(layers[name], reason)
    _forget(seen, {f'{name}._input_quantizer' for name in left})
    if joins:
        insert_joins(model, seen, all_adds=joins == 'all')
    make_joining(model, find_ties(model, seen))
    return Converted(left, seen.returned)


def _keep_layer_float(layer: Any, reason: str) -> None:
    """Keeps a layer float, without those inside it."""
    if isinstance(layer, QuantLayer):
        layer._input_quantizer.keep_float(reason)
        layer._weight_quantizer.keep_float(reason)
    else:
        layer.float_reason = reason


def quantize_parts(
    model: nn.Module,
    joins: bool | str = True,
    example: Mapping[str, Sequence[Any]] | None = None,
) -> Converted:
    """Quantizes the parts of a detector in place; those that cannot be stay float.

    A part is run on what the one before it returned, as ``core.ties.LINKS`` has it.

    Args:
        model: A detector; its children are the parts. Those of quantized types are left alone.
        joins: See :func:`quantize`.
        example: Shapes of the arguments by name of the part.

    Returns:
        :class:`Converted`.

    Raises:
        ValueError: If ``example`` names no part, a part cannot be run on its own, or nothing can be
            quantized.
    """
    parts = {name: part for name, part in model.named_children() if weighted(part)}
    if not isinstance(example or {}, Mapping):
        raise ValueError(
            f'example of a detector expects a dict such as dict(neck=[...]), got {example!r}'
        )
    shapes = dict(example or {})
    unknown = [name for name in shapes if name not in parts]
    if unknown:
        known = ', '.join(parts)
        raise ValueError(f'example: {unknown[0]!r} is no part of the model; it has {known}')
    left: dict[str, str] = {}
    returned: dict[str, Any] = {}
    for name, part in sorted(parts.items(), key=lambda item: _rank(item[0])):
        if is_quant_type(part) or getattr(part, 'takes_skip', False):
            continue
        why = next((why for at, why in FLOAT_PARTS.items() if fnmatchcase(name, at)), None)
        if why is None:
            before = [[x] for source, x in returned.items() if name in fed_by(source)]
            own = shapes.get(name)
            inputs = [given_example(own)] if own else chain(before, examples(part))
            try:
                made = quantize(part, joins, inputs)
            except ValueError as err:
                if own:
                    raise
                why = _why_whole(part, err)
            else:
                returned[name] = made.returned
                left.update({f'{name}.{inside}': text for inside, text in made.left.items()})
                continue
        keep_float(model, {name: why})
        left.update({f'{name}.{inside}': why for inside in weighted(part)})
    if not any(q.float_reason is None for q in quantizers(model).values()):
        reasons = '; '.join(dict.fromkeys(left.values())) or 'it has no layers with weights'
        raise ValueError(f'nothing in {type(model).__name__} can be quantized: {reasons}')
    return Converted(left)


def _rank(name: str) -> int:
    """Place of a part in the order in which they are run."""
    order = ('backbone', 'neck', 'head')
    return next((i for i, word in enumerate(order) if word in name), 0)


def is_quant_type(module: nn.Module) -> bool:
    """Tells whether a module is of a type that is written to be quantized."""
    ours = type(module).__module__.startswith('mmdet3d_quant.')
    return ours and type(module).__name__.startswith('Quant')


def _why_whole(part: nn.Module, err: ValueError) -> str:
    """Why a part of a detector stays float as a whole."""
    named = f'Quant{type(part).__name__}'
    if MODELS.get(named) is not None:
        return f'there is a type for it: {named}'
    return str(err).partition(': give')[0]


def _watch(model: nn.Module, inputs: Iterable[Sequence[Any]]) -> Seen:
    """Runs a module on the first arguments that it takes."""
    problem = ''
    for arguments in inputs:
        try:
            with torch.random.fork_rng(devices=[]), _without_checkpoints(model):
                return watch_meetings(model, arguments)
        except Exception as err:  # whatever its forward raises
            lines = str(err).splitlines() or ['']
            problem = problem or f'{type(err).__name__}: {lines[0]}'
    raise ValueError(
        f'{type(model).__name__} cannot be run to see where its tensors meet '
        f'({problem or "no layer tells the channels of its input"}): give the '
        'shapes of the arguments of its forward, such as example=[(1, 3, 64, 64)], or '
        '[[(1, 64, 32, 32), (1, 128, 16, 16)]] for a list of maps'
    )


@contextmanager
def _without_checkpoints(model: nn.Module) -> Iterator[None]:
    """Lets modules compute their forward where it is seen, once."""
    modules = [m for m in model.modules() if getattr(m, 'with_cp', False)]
    try:
        for module in modules:
            vars(module)['with_cp'] = False
        yield
    finally:
        for module in modules:
            vars(module)['with_cp'] = True


def _forget(seen: Seen, names: set[str]) -> None:
    """Makes readers that turned out to be float such ones."""
    for key, readers in seen.readers.items():
        seen.others[key] += len(names.intersection(readers))
        seen.readers[key] = [name for name in readers if name not in names]
