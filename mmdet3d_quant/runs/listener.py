"""Interface by which a long job reports its progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Listener:
    """Receives the progress of a job; a subclass shows it, this one ignores it."""

    def note(self, text: str) -> None:
        """Receives a line on the current work."""

    def warn(self, text: str) -> None:
        """Receives a line of warning."""

    @contextmanager
    def counting(self, title: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Surrounds counted work.

        Args:
            title: Name of the items counted.
            total: Number of items.
            done: Number of items done before.

        Yields:
            Function that takes the number of items done by now.
        """
        yield lambda done: None
