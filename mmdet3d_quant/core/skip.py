"""What to write in a config so that something stays float."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from inspect import signature

from torch import nn

#: Reason in the lines to paste, where none is known.
WHY = 'why'


def covering(names: Collection[str], among: Collection[str]) -> dict[str, list[str]]:
    """Groups names under the highest modules that contain no other of the names they are among.

    Args:
        names: Dotted names.
        among: All names, ``names`` included.

    Returns:
        Dict from module to its names, in their order; ``'*'`` for the whole model.

    >>> covering(['a.b.x', 'a.b.y', 'c.x'], ['a.b.x', 'a.b.y', 'c.x', 'c.y'])
    {'a': ['a.b.x', 'a.b.y'], 'c.x': ['c.x']}
    """
    if set(names) == set(among):
        return {'*': list(names)} if names else {}
    mixed: set[str] = set()
    for name in set(among) - set(names):
        mixed.update(_upwards(name))
    groups: dict[str, list[str]] = {}
    for name in names:
        top = [module for module in _upwards(name) if module not in mixed]
        groups.setdefault(top[-1] if top else name, []).append(name)
    return groups


def _upwards(name: str) -> list[str]:
    """A name, and the modules around it up to the top-level part."""
    parts = name.split('.')
    return ['.'.join(parts[:end]) for end in range(len(parts), 0, -1)]


def skip_lines(model: nn.Module, skip: Mapping[str, str]) -> str:
    """Writes the config of a model that keeps something float, ready to be pasted.

    Args:
        model: The model.
        skip: Reason by pattern, relative to ``model``.
    """
    own = getattr(model, 'takes_skip', False)  # built by a type that does
    if own or 'skip' in signature(type(model).__init__).parameters:
        return f'skip={dict(skip)}'
    return f"model = dict(type='Quantized', of={type(model).__name__!r}, skip={dict(skip)})"


def how_to_skip(
    model: nn.Module,
    names: Collection[str],
    among: Collection[str],
    reasons: Mapping[str, str] | None = None,
) -> str:
    """Writes the config that keeps quantizers float; see :func:`skip_lines`.

    Args:
        model: The model.
        names: Quantizers to keep float.
        among: All quantizers of the model.
        reasons: Reason by name, as far as they are known.
    """
    known = reasons or {}
    skip = {}
    for pattern, inside in covering(names, among).items():
        found = dict.fromkeys(known.get(n, '') for n in inside)
        skip[pattern] = '; '.join(r for r in found if r and not r.startswith('skip=')) or WHY
    return skip_lines(model, skip)
