"""Deep copies of modules and batches that hold results of a forward."""

from __future__ import annotations

import copy
from typing import Any, Iterator, TypeVar

import torch
from torch import Tensor, nn

from mmdet3d_quant.core.compat import strict_zip

Value = TypeVar('Value')


def deep_copy(value: Value) -> Value:
    """Copies a module or a batch deeply; tensors with a gradient history become plain ones.

    ``copy.deepcopy`` refuses those, which modules hold that keep a feature of the last forward.

    Args:
        value: A module, or tensors in lists, tuples and dicts.

    Returns:
        The copy.
    """
    held = [vars(m) for m in value.modules()] if isinstance(value, nn.Module) else value
    memo = {id(x): x.detach().clone() for x in tensors(held) if not x.is_leaf}
    return copy.deepcopy(value, memo)


def tensors(value: Any) -> Iterator[Tensor]:
    """Finds the tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def uncompiled(module: nn.Module) -> nn.Module:
    """Returns a module without the wrappers of ``torch.compile``; a copy, if some are inside."""
    module = getattr(module, '_orig_mod', module)
    if not any(hasattr(m, '_orig_mod') for m in module.modules()):
        return module
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = getattr(child, '_orig_mod', child)
    return module


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies tensors to others of the same shapes, on a GPU in one launch where torch can."""
    if hasattr(torch, '_foreach_copy_'):  # from torch 2.1 on
        torch._foreach_copy_(targets, sources)
        return
    for target, source in strict_zip(targets, sources):
        target.copy_(source)
