"""Paths in a config."""

from __future__ import annotations

from typing import Any


def replace_start(value: Any, old: str, new: str) -> Any:
    """Replaces the start of paths in a config.

    Args:
        value: A config, or a part of it.
        old: Start of the strings to change.
        new: Their new start.

    Returns:
        Copy of ``value``; all else in it is as before.
    """
    if isinstance(value, dict):
        return {k: replace_start(v, old, new) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(replace_start(v, old, new) for v in value)
    same = not isinstance(value, str) or not value.startswith(old)
    return value if same else new + value[len(old) :]
