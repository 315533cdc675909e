"""Backports for Python 3.8, the version of mmdet3d's installation guide."""

from __future__ import annotations

from typing import Any, Iterator

_END = object()


def strict_zip(*iterables: Any) -> Iterator[tuple[Any, ...]]:
    """``zip(..., strict=True)`` of Python 3.10.

    Raises:
        ValueError: If one iterable ends before the others.
    """
    iterators = [iter(values) for values in iterables]
    while iterators:
        row = tuple(next(values, _END) for values in iterators)
        ended = sum(value is _END for value in row)
        if ended == len(row):
            return
        if ended:
            raise ValueError(f'of {len(row)} iterables {ended} ended before the others')
        yield row


def removeprefix(text: str, prefix: str) -> str:
    """``str.removeprefix`` of Python 3.9."""
    return text[len(prefix) :] if prefix and text.startswith(prefix) else text


def removesuffix(text: str, suffix: str) -> str:
    """``str.removesuffix`` of Python 3.9."""
    return text[: -len(suffix)] if suffix and text.endswith(suffix) else text
