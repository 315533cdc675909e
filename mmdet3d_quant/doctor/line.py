"""One line of what the doctor says, and how grave it is."""

from __future__ import annotations

from dataclasses import dataclass

#: Nothing is known against it; worth knowing, nothing to do; costs time; fails or gives other
#: numbers.
OK, NOTE, SLOW, WRONG = 'ok', 'note', 'slow', 'wrong'


@dataclass(frozen=True)
class Line:
    """What was found of one thing.

    Attributes:
        group: Heading that it stands under.
        name: What was looked at.
        status: :data:`OK`, :data:`NOTE`, :data:`SLOW` or :data:`WRONG`.
        found: What is there.
        says: What follows from it; empty where nothing does.
        remedy: What to do; never empty where the status is slow or wrong.
    """

    group: str
    name: str
    status: str
    found: str
    says: str = ''
    remedy: str = ''
