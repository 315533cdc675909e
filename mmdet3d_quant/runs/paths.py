"""Paths in a config."""

from __future__ import annotations

from typing import Any


def replace_start(value: Any, old: str, new: str) -> Any:
    """Gives the paths in a config another start.

    Args:
        value: A config, or a part of it.
        old: What the texts to change begin with.
        new: What they begin with then.

    Returns:
        A copy; all else in it is as before.
    """
    if isinstance(value, dict):
        return {k: replace_start(v, old, new) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(replace_start(v, old, new) for v in value)
    same = not isinstance(value, str) or not value.startswith(old)
    return value if same else new + value[len(old) :]
