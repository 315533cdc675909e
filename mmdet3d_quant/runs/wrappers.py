"""Names that a wrapper of the model has put a prefix before: DDP, ``torch.compile``, a trainer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn

from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.parents.derived import DERIVED, derived_modules

WRAPPERS = ('module.', '_orig_mod.', 'model.')
#: What averaged models keep beside the model: how often they were updated.
_COUNTERS = ('n_averaged', 'steps')


def prefixes(names: Collection[str]) -> list[str]:
    """Finds the wrappers' prefixes that all names have.

    Args:
        names: Of a state dict.

    Returns:
        Every nesting, shortest first, ``''`` among them.

    >>> prefixes(['module.model.a', 'module.model.b'])
    ['', 'module.', 'module.model.']
    """
    names = [name for name in names if name not in _COUNTERS] or list(names)
    found = ['']
    while names:
        longer = (found[-1] + wrapper for wrapper in WRAPPERS)
        prefix = next((p for p in longer if all(name.startswith(p) for name in names)), None)
        if prefix is None:
            break
        found.append(prefix)
    return found


def without(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Takes a prefix off the names of a state dict, those of its ``_metadata`` too.

    Args:
        state: All its names have the prefix, but for counters, which are left out.
        prefix: One of :func:`prefixes`.

    Returns:
        A state dict; ``state`` itself without a prefix.
    """
    if not prefix:
        return state
    new = type(state)((n[len(prefix) :], v) for n, v in state.items() if n.startswith(prefix))
    metadata = getattr(state, '_metadata', None)
    if metadata is not None:
        wrapper = prefix[:-1]
        new._metadata = {  # type: ignore[attr-defined]
            name[len(prefix) :]: value
            for name, value in metadata.items()
            if name == wrapper or name.startswith(prefix)
        }
    return new


def fitting(names: Collection[str], model: nn.Module) -> str:
    """The shortest prefix without which names are those of a model; ``''`` if there is none.

    Ranges, and what a model can do without, may be missing.
    """
    own = set(model.state_dict())
    free = {f'{name}._amax' for name in quantizers(model)}
    free |= {f'{module}.{key}' for module, _ in derived_modules(model) for key in DERIVED}
    needed = {n for n in own - free if not n.endswith('num_batches_tracked')}
    for prefix in prefixes(names):
        bare = {name[len(prefix) :] for name in names if name.startswith(prefix)}
        if needed <= bare and all(name in own or name.endswith('._amax') for name in bare):
            return prefix
    return ''


def accept_wrapped(model: nn.Module) -> None:
    """Lets weights of a wrapped model load by whatever loader; tells the prefix in a line.

    Args:
        model: Any module, itself in a wrapper or not; calling it again changes nothing.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, 'hook', None) is _unwrap for hook in hooks):
        model._register_load_state_dict_pre_hook(_unwrap, with_module=True)


def tell(prefix: str, path: Any = 'the checkpoint') -> None:
    """Says that a prefix was taken off."""
    if prefix:
        print_log(f'{path}: {prefix!r} before all names is taken off', logger='current')


def _unwrap(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    if prefix or not state_dict:
        return
    wrapper = fitting(state_dict, module)
    if wrapper:
        bare = without(dict(state_dict), wrapper)
        state_dict.clear()
        state_dict.update(bare)
        tell(wrapper)
