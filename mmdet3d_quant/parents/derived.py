"""Tensors of a view transform that checkpoints hold, but its config decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

#: Parameters that BEVFusion's view transforms compute from their arguments and never train.
DERIVED = ('dx', 'bx', 'nx', 'frustum')
#: Rounding of a checkpoint in FP16, relative; such a tensor is the config's own.
_ROUNDED = 1e-3


def derived_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the names and modules with such tensors, the public project's included."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if all(key in own and not own[key].requires_grad for key in DERIVED):
            yield name, module


def take_derived_from_config(model: nn.Module) -> None:
    """Lets a checkpoint of another image size or grid load: tensors that follow from these stay.

    Works with any loader, like :func:`~mmdet3d_quant.parents.sparse_layout.accept_any_layout`.
    Values that agree within the rounding of FP16 come from the checkpoint. Calling it again
    changes nothing.

    Args:
        model: Any module.
    """
    for _, module in derived_modules(model):
        hooks = module._load_state_dict_pre_hooks.values()
        if not any(getattr(hook, 'hook', None) is _keep_own for hook in hooks):
            module._register_load_state_dict_pre_hook(_keep_own, with_module=True)


def _keep_own(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    other = []
    for key in DERIVED:
        own, given = getattr(module, key).detach(), state_dict.get(prefix + key)
        if given is None or not _agree(own, given):
            state_dict[prefix + key] = own
            other.append(key)
    if other:
        print_log(
            f'{prefix}{", ".join(other)}: computed from the config; the checkpoint was made with '
            'another image size or grid',
            logger='current',
        )


def _agree(own: Tensor, given: Tensor) -> bool:
    if own.shape != given.shape:
        return False
    return torch.allclose(own.double(), given.to(own.device).double(), rtol=_ROUNDED, atol=1e-6)
