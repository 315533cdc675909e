"""Which tensors a concatenated tensor is made of, seen while a model runs."""

from __future__ import annotations

import weakref
from typing import Any, Tuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CONCATS = tuple(
    getattr(torch, name) for name in ('cat', 'concat', 'concatenate') if hasattr(torch, name)
)


class Joins(TorchFunctionMode):
    """Records, while entered, the channels that each input brings to a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[weakref.ref[Tensor], Tuple[int, ...]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _CONCATS and isinstance(result, Tensor) and result.dim() > 1:
            tensors = args[0] if args else kwargs['tensors']
            dim = args[1] if len(args) > 1 else kwargs.get('dim', kwargs.get('axis', 0))
            if isinstance(dim, int) and dim % result.dim() == 1:
                sizes = tuple(t.shape[1] for t in tensors if t.dim() == result.dim())
                self._known[id(result)] = (weakref.ref(result), sizes)
        return result

    def parts(self, x: Tensor) -> tuple[int, ...]:
        """Channels of each input of the concatenation that made a tensor; () if none did."""
        ref, sizes = self._known.get(id(x), (None, ()))
        return sizes if ref is not None and ref() is x else ()
