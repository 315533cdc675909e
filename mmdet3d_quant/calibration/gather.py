"""Results by batch of all processes, in one order whatever their number."""

from __future__ import annotations

from typing import TypeVar

from mmengine.dist import all_gather_object

Result = TypeVar('Result')


def gather_batches(own: dict[int, Result], who: str) -> dict[int, Result]:
    """Joins what the processes have found on held-out batches.

    Args:
        own: Results of this process by number of the batch.
        who: What needs them, for the error: subject and verb.

    Returns:
        Those of all processes, in the order of the batches; the same in each of them.

    Raises:
        ValueError: If there are none.
    """
    merged: dict[int, Result] = {}
    for part in all_gather_object(own):
        merged.update(part)
    if not merged:
        raise ValueError(f'{who} a held-out batch: use more batches')
    return dict(sorted(merged.items()))
