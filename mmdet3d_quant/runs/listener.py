"""How a long job tells what it does, for whoever wants to show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Listener:
    """Is told how a job goes on; a subclass shows it, this one keeps it to itself."""

    def note(self, text: str) -> None:
        """Takes a line on what is done."""

    def warn(self, text: str) -> None:
        """Takes a line on what is odd."""

    @contextmanager
    def counting(self, title: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Surrounds work that is counted.

        Args:
            title: What is counted.
            total: How much there is.
            done: How much of it was done before.

        Yields:
            A function that takes how much is done now.
        """
        yield lambda done: None
