"""Quantizers where adds and concats need them, and ties, from what one run has shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.joining import Found, add_join
from mmdet3d_quant.layers.meetings import Key, Meeting, Seen


def find_ties(model: nn.Module, seen: Seen) -> Found:
    """Finds which quantizers of a module must share a scale.

    Those do that read one tensor, or tensors of the same values; and those of the operands of a
    concat and of its readers, where its operands are quantized.

    Args:
        model: The module that was watched.
        seen: What was seen.

    Returns:
        :class:`~mmdet3d_quant.layers.joining.Found`.
    """
    groups = [_unique(names) for names in seen.readers.values()]
    joins = _joins(model)
    for meeting in seen.meetings:
        own = [_own(seen, key, joins) for key in meeting.operands]
        if meeting.kind == 'cat' and all(own):
            groups.append(_unique(n for names in own for n in names) + _of(seen, meeting.result))
    return Found(
        [_unique(group) for group in groups if len(set(group)) > 1],
        [_of(seen, key) for key in seen.inputs],
        [_of(seen, key) for key in seen.outputs],
    )


def insert_joins(model: nn.Module, seen: Seen, all_adds: bool = False) -> list[str]:
    """Puts quantizers before the adds and concats of a module that need them.

    * Of an add, one summand stays as it is if a layer made it for the add alone: engines add to
      the sums of that layer. The other is rounded; both are, with one scale, if no layer did.
    * An add stays float if a summand is wanted in float anyway: functions other than adds read it,
      and no quantizer does, as of the stream that a transformer normalises and adds to.
    * All operands of a concat are rounded with one scale if a quantizer reads the result.

    Args:
        model: The module that was watched; changed in place.
        seen: What was seen; the new quantizers are added to its readers.
        all_adds: Round the operands of the adds, too, that would stay float.

    Returns:
        list of str, the names of the new quantizers.
    """
    joins = _joins(model)
    made = []
    for name, meetings in _by_site(seen, 'add').items():
        operands = sorted({i for m in meetings for i in _rounded(seen, m, joins, all_adds)})
        if operands:
            made.append(_insert(model, seen, name, meetings, operands))
    for name, meetings in reversed(list(_by_site(seen, 'cat').items())):  # one may read another
        served = all(_own(seen, key, joins) for m in meetings for key in m.operands)
        if not served and any(seen.readers.get(m.result) for m in meetings):
            made.append(_insert(model, seen, name, meetings, None))
    return made


def _rounded(seen: Seen, meeting: Meeting, joins: set[str], all_adds: bool) -> list[int]:
    """Numbers of the summands to round."""
    keys = meeting.operands
    if any(_own(seen, key, joins) for key in keys):
        return []
    bare = [i for i, key in enumerate(keys) if key in seen.makers and seen.uses[key] == 1]
    others = [i for i in range(len(keys)) if i not in bare[:1]]
    return others if all_adds or not any(_wants_float(seen, keys[i]) for i in others) else []


def _wants_float(seen: Seen, key: Key) -> bool:
    return bool(seen.others[key]) and not seen.readers.get(key)


def _insert(model: nn.Module, seen: Seen, name: str, meetings: list[Meeting], operands: Any) -> str:
    first = meetings[0]
    own = add_join(model.get_submodule(first.owner), first.site, name.rpartition('.')[2], operands)
    full = f'{first.owner}.{own}' if first.owner else own
    for meeting in meetings:
        for i, key in enumerate(meeting.operands):
            if operands is None or i in operands:
                seen.readers[key].append(full)
    return full


def _by_site(seen: Seen, kind: str) -> dict[str, list[Meeting]]:
    """Groups meetings by their place in the code, as a module may be called several times.

    Returns:
        Dict from the name of the owner and the number among its places, ``layer1.0.add0``.
    """
    names: dict[Any, str] = {}
    counts: Counter[str] = Counter()
    groups: dict[str, list[Meeting]] = {}
    for meeting in seen.meetings:
        if meeting.kind != kind:
            continue
        place = meeting.owner, meeting.site
        if place not in names:
            names[place] = f'{meeting.owner}.{kind}{counts[meeting.owner]}'
            counts[meeting.owner] += 1
        groups.setdefault(names[place], []).append(meeting)
    return groups


def _joins(model: nn.Module) -> set[str]:
    """Names of the quantizers that are not of layers."""
    layers = [m for m in model.modules() if isinstance(m, QuantLayer)]
    own = {q for m in layers for q in (m._input_quantizer, m._weight_quantizer)}
    return {name for name, q in quantizers(model).items() if q not in own}


def _own(seen: Seen, key: Key, joins: set[str]) -> list[str]:
    return [name for name in seen.readers.get(key, ()) if name in joins]


def _of(seen: Seen, key: Key) -> list[str]:
    return _unique(seen.readers.get(key, ()))


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
