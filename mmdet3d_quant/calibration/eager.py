"""Running a model without the graphs that ``torch.compile`` made of it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

from torch import nn

from mmdet3d_quant.core.compat import strict_zip


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[nn.Module]:
    """Takes compiled modules out of a model for a while.

    What observes a model is no part of a compiled graph.

    Yields:
        The model, or what a compiled wrapper around it wraps; the same parameters and buffers.
    """
    plain = getattr(model, '_orig_mod', model)
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    in_place = [m for m in plain.modules() if getattr(m, '_compiled_call_impl', None) is not None]
    calls = [m._compiled_call_impl for m in in_place]
    try:
        for module in in_place:
            module._compiled_call_impl = None
        for parent in list(plain.modules()):
            for name, child in parent._modules.items():
                if hasattr(child, '_orig_mod'):
                    swapped.append((parent, name, child))
        for parent, name, child in swapped:
            parent._modules[name] = child._orig_mod
        yield plain
    finally:
        for parent, name, child in swapped:
            parent._modules[name] = child
        for module, call in strict_zip(in_place, calls):
            module._compiled_call_impl = call
