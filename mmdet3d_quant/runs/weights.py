"""Loads weights that must fit a model, and says in what they do not."""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from torch import nn

from mmdet3d_quant.core.modes import (
    float_state_dict,
    kept_float,
    quantizers,
    require_calibrated,
)
from mmdet3d_quant.core.unsigned import load_unsigned_ranges
from mmdet3d_quant.files.checkpoint import CheckpointError, read_checkpoint
from mmdet3d_quant.parents.derived import take_derived_from_config
from mmdet3d_quant.parents.sparse_layout import accept_any_layout
from mmdet3d_quant.runs.conversion import maker_of
from mmdet3d_quant.runs.wrappers import fitting, prefixes, tell, without

_MISMATCH = re.compile(r'(?:size|(format)) mismatch for (\S+): (?(1)(.*?)\.|copying)')
_SHOWN = 10
_CALIBRATE = 'run tools/calibrate.py with this config'
_TRAIN = (
    'Set the config as the checkpoint was trained (num_classes, channels, ...). To start from it '
    'with others, name it as load_from of a training in float, which takes what fits; then '
    f'{_CALIBRATE}'
)


def load_weights(model: nn.Module, path: str | Path, calibrated: bool) -> dict[str, Any]:
    """Loads a checkpoint that must fit the model.

    Args:
        model: The model; its quantizers are loaded too where the checkpoint has them.
        path: The checkpoint. Prefixes of wrappers are taken off if the rest fits.
        calibrated: Whether every quantizer must have a range afterwards. If not, ranges of
            another shape or number format are left out, which is told.

    Returns:
        The checkpoint's ``meta``.

    Raises:
        CheckpointError: If the file cannot be read, its ``meta`` has notes that are none, or a
            weight is missing, left over or of another shape. Sparse weights may have the layout of
            spconv 1 (mmcv) or 2.
        UncalibratedError: If ``calibrated`` and a quantizer has no range; if others have one, with
            the lines of the config that keep it float as it was when the checkpoint was saved.
    """
    checkpoint = read_checkpoint(path)
    given = checkpoint['state_dict']
    accept_any_layout(model)  # a LiDAR encoder of the public project does not by itself
    take_derived_from_config(model)  # nor its view transform
    prefix = fitting(given, model)
    tell(prefix, path)
    state = without(given, prefix or _nearest(given, model))
    ranges = {f'{name}._amax' for name in quantizers(model)}
    missing, unknown, shapes = _load(model, state, path)
    missing -= ranges | shapes.keys()
    if missing or unknown or shapes.keys() - ranges:
        maker = maker_of(given)
        if maker:
            raise CheckpointError(f'checkpoint {path} is {maker}')
        raise CheckpointError(_misfit(path, model, missing, unknown, shapes))
    if shapes and calibrated:
        raise CheckpointError(
            f'checkpoint {path} has {len(shapes)} ranges of another shape or number format than '
            f'the quantizers of the model: {_CALIBRATE}{_lines(shapes)}'
        )
    if shapes:
        print_log(
            f'{path}: {len(shapes)} ranges are of another shape or number format and were not '
            f'loaded{_lines(shapes)}',
            logger='current',
        )
    ignored = [n for n in kept_float(model) if f'{n}._amax' in state]
    if ignored:
        print_log(
            f'{path}: {len(ignored)} ranges are not used, since the config keeps these quantizers '
            f'float: {", ".join(ignored[:_SHOWN])}{", ..." if ignored[_SHOWN:] else ""}',
            logger='current',
            level=logging.WARNING,
        )
    if calibrated:
        reasons = checkpoint['meta'].get('kept_float')
        require_calibrated(model, reasons if isinstance(reasons, dict) else None)
    try:
        load_unsigned_ranges(model, checkpoint['meta'].get('unsigned_ranges') or {})
    except ValueError as err:
        raise CheckpointError(f'meta of checkpoint {path}: {err}') from err
    return checkpoint['meta']


def _load(
    model: nn.Module, state: dict[str, Any], path: Any
) -> tuple[set[str], set[str], dict[str, str]]:
    """Loads what fits; names that are missing, unknown, of another shape or format (with both)."""
    try:
        keys = model.load_state_dict(state, strict=False)
        return set(keys.missing_keys), set(keys.unexpected_keys), {}
    except RuntimeError as err:
        lines = [line.strip() for line in str(err).splitlines()[1:]] or [str(err)]
    found = [_MISMATCH.match(line) for line in lines]
    if not all(found):
        odd = next(line for line, match in zip(lines, found) if not match)
        raise CheckpointError(f'checkpoint {path} is of another architecture: {odd}')
    names = {match[2]: match[3] for match in found if match}
    own = model.state_dict()
    shapes = {
        name: what
        or f'{tuple(state[name].shape)} in the checkpoint, {tuple(own[name].shape)} in the model'
        for name, what in names.items()
    }
    rest = copy.copy(state)  # with its _metadata
    for name in names:
        del rest[name]
    keys = model.load_state_dict(rest, strict=False)
    return set(keys.missing_keys), set(keys.unexpected_keys), shapes


def _nearest(state: Mapping[str, Any], model: nn.Module) -> str:
    """The prefix without which most names are those of a model, where not all are."""
    own = model.state_dict().keys()
    known = {p: sum(n[len(p) :] in own for n in state if n.startswith(p)) for p in prefixes(state)}
    return max(known, key=lambda prefix: known[prefix])


def _misfit(
    path: Any,
    model: nn.Module,
    missing: Collection[str],
    unknown: Collection[str],
    shapes: Mapping[str, str],
) -> str:
    """An error that tells by parts of the model what does not fit, and the remedy."""
    order = {name: place for place, name in enumerate(float_state_dict(model))}
    lost = sorted(missing, key=lambda name: order.get(name, 0))
    told = []
    if lost:
        told.append(f'it lacks {len(lost)} of {len(order)} entries, {_grouped(lost)}')
    if unknown:
        told.append(f'it has {len(unknown)} unknown entries, {_grouped(sorted(unknown))}')
    if shapes:
        told.append(f'{len(shapes)} entries do not fit in shape:{_lines(shapes)}')
    text = f'checkpoint {path} is of another architecture: ' + '; '.join(told)
    if shapes and not lost and not unknown:
        return f'{text}\n{_TRAIN}'
    if not lost and not shapes and all(name.endswith('_quantizer._amax') for name in unknown):
        return f'{text}. Those are ranges: give a config that quantizes the same layers'
    return text


def _grouped(names: list[str]) -> str:
    """How many names there are in every part, and the first ones."""
    parts = Counter(name.partition('.')[0] for name in names)
    counts = ', '.join(f'{part} {count}' for part, count in parts.most_common(_SHOWN))
    more = ', ...' if names[3:] else ''
    return f'for example {", ".join(names[:3])}{more} ({counts})'


def _lines(shapes: Mapping[str, str]) -> str:
    shown = [f'\n  {name}: {what}' for name, what in list(shapes.items())[:_SHOWN]]
    return ''.join(shown) + (f'\n  ... {len(shapes) - _SHOWN} more' if len(shapes) > _SHOWN else '')
