"""Records about tensors, kept for as long as a tensor lives and is not changed."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


class Records:
    """Records by tensor object; an in-place change of the tensor voids its record."""

    def __init__(self) -> None:
        # By id: a tensor's equality is elementwise, and torch's own dictionary costs more to ask.
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Any]] = {}

    def note(self, x: Tensor, record: Any) -> None:
        """Keeps a record about a tensor; none of None, and none about an inference tensor."""
        if record is None or x.is_inference():
            return
        key, known = id(x), self._known

        def forget(dead: weakref.ref[Tensor]) -> None:
            if key in known and known[key][0] is dead:
                del known[key]

        known[key] = weakref.ref(x, forget), x._version, record

    def get(self, x: Tensor) -> Any:
        """Looks up the record about a tensor.

        Returns:
            The record; None if there is none or the tensor has changed since.
        """
        ref, version, record = self._known.get(id(x), _NONE)
        if ref is None or ref() is not x or x.is_inference() or version != x._version:
            return None
        return record


_NONE: tuple = (None, -1, None)
