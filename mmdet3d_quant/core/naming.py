"""Names of types in a config: ``'QuantResNet'``, ``'mmdet.ResNet'``, a dotted path or a class."""

from __future__ import annotations

from typing import Any


def type_name(kind: Any) -> str:
    """Extracts the name of a type, without scope or module.

    Args:
        kind: A name, with scope or not; a dotted path; or the class or function itself, as
            mmengine's Python configs have it.

    Example:
        >>> type_name('mmdet.ResNet'), type_name(dict)
        ('ResNet', 'dict')
    """
    return kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', '')


def dotted(kind: Any) -> str:
    """Composes the path by which mmengine's registries find a class: module and name."""
    return f'{kind.__module__}.{kind.__qualname__}'
