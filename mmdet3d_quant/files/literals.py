"""Python text of plain values, as a person writes them in a config."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap
from typing import Any

from mmdet3d_quant.core.compat import strict_zip

#: Line length of what is written.
WIDTH = 100


def assignment(name: str, value: Any, indent: int = 0) -> str:
    """``name=value`` inside of a call, else ``name = value``."""
    equal = '=' if indent else ' = '
    return f'{name}{equal}{literal(value, indent, len(name) + len(equal))}'


def literal(value: Any, indent: int, before: int = 0) -> str:
    """Python text of plain values, broken where too long; dicts with names as keys as calls."""
    text = _flat(value)
    if indent + before + len(text) < WIDTH:
        return text
    if isinstance(value, str):
        return _wrapped(value, indent)
    inner = indent + 4
    if isinstance(value, Mapping):
        named = _named(value)
        marks = ('dict(', ')') if named else ('{', '}')
        keys = [f'{k}=' if named else f'{k!r}: ' for k in value]
        rows = [f'{k}{literal(v, inner, len(k))}' for k, v in strict_zip(keys, value.values())]
    elif isinstance(value, (list, tuple)):
        marks = ('[', ']') if isinstance(value, list) else ('(', ')')
        rows = [literal(item, inner) for item in value]
    else:
        return text
    lines = [marks[0], *(f'{" " * inner}{row},' for row in rows), f'{" " * indent}{marks[1]}']
    return '\n'.join(lines)


def _wrapped(text: str, indent: int) -> str:
    """A long text as several that Python joins."""
    space = ' ' * (indent + 4)
    pieces = wrap(text, WIDTH - indent - 8, drop_whitespace=False, break_on_hyphens=False)
    return '\n'.join(['(', *(f'{space}{piece!r}' for piece in pieces), ' ' * indent + ')'])


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        if _named(value):
            return f'dict({", ".join(f"{k}={_flat(v)}" for k, v in value.items())})'
        return f'{{{", ".join(f"{k!r}: {_flat(v)}" for k, v in value.items())}}}'
    if isinstance(value, (list, tuple)):
        inside = ', '.join(map(_flat, value))
        end = ',' if isinstance(value, tuple) and len(value) == 1 else ''
        return f'[{inside}]' if isinstance(value, list) else f'({inside}{end})'
    return repr(value)


def _named(value: Mapping) -> bool:
    return all(isinstance(k, str) and k.isidentifier() for k in value)
