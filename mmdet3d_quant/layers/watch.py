"""Watching one forward: what reads the outputs of convolutions."""

from __future__ import annotations

import gc
import weakref
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet3d_quant.core.quantizer import Quantizer

#: Modules that, in eval mode, hand on the very tensor that they get.
KEEPING = (nn.Identity, _DropoutNd)


class _Output:
    """One output of a convolution, while it lives."""

    def __init__(self, conv: nn.Module, tensor: Tensor):
        self.conv, self.ref = conv, weakref.ref(tensor)


class Watch(TorchDispatchMode):
    """Records, while entered, which module reads what, by operator and by module.

    Tensors are told apart by their storage, so that a view is a reader, too. Operators are seen
    below autograd; modules are looked at as well, as some compute on memory without operators.

    Args:
        model: Model whose forward is to be watched.
        makers: Types of the modules whose outputs are watched.
        readers: Type of the modules that may read them.
        dims: Gives the number of axes that an output of a maker must have, channels at axis 1.

    Attributes:
        sources: By reader, the makers of all that it read; None for what has another origin.
        spoiled: By maker, why its outputs and its weight must stay as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        makers: tuple[type, ...],
        readers: type,
        dims: Callable[[nn.Module], int],
    ) -> None:
        super().__init__()
        self.sources: dict[nn.Module, set[nn.Module | None]] = {}
        self.spoiled: dict[nn.Module, str] = {}
        self._model, self._makers, self._readers, self._dims = model, makers, readers, dims
        self._live: dict[int, _Output] = {}
        self._owners: dict[int, set[nn.Module]] = {}
        self._inside: list[nn.Module] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for module in self._model.modules():
            watched = isinstance(module, (*self._makers, self._readers))
            if watched:
                for parameter in module.parameters(recurse=False):
                    self._owners.setdefault(storage_of(parameter), set()).add(module)
            if watched or not (list(module.children()) or _hands_on(module)):
                self._handles += hook_calls(module, self._entering, self._leaving)
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        remove_hooks(self._handles)
        self._live.clear()

    def check_kept(self) -> None:
        """Notes the outputs that outlive the forward; to be called while its result is held."""
        if any(output.ref() is not None for output in self._live.values()):
            gc.collect()
        for output in self._live.values():
            if output.ref() is not None:
                self._spoil(output.conv, 'its output is kept or returned')

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tensors_in((args, kwargs or {})):
            key = storage_of(x)
            output = self._live.get(key)
            reader = self._inside[-1] if self._inside else None
            if output is not None and not isinstance(reader, self._readers):
                self._spoil(output.conv, f'its output is read by {func}, too')
            for owner in self._owners.get(key, ()) if self._foreign(key) else ():
                self._spoil(owner, f'its weights are read by {func} outside of it')
        return func(*args, **(kwargs or {}))

    def _foreign(self, key: int) -> bool:
        """Whether a parameter is read while none of the modules that own it is running."""
        return not self._owners.get(key, set()).intersection(self._inside)

    def _entering(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for x in tensors_in((args, kwargs)):
            output = self._live.get(storage_of(x))
            if isinstance(module, self._readers):
                self.sources.setdefault(module, set()).add(None if output is None else output.conv)
            elif output is not None:
                self._spoil(output.conv, f'its output is read by a {type(module).__name__}, too')
        self._inside.append(module)

    def _leaving(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        while self._inside and self._inside.pop() is not module:
            pass  # what an exception left behind
        if isinstance(module, self._makers):
            for x in tensors_in(result):
                self._add(module, x)
                if x.dim() != self._dims(module):
                    self._spoil(module, f'its output has {x.dim()} axes')

    def _add(self, conv: nn.Module, x: Tensor) -> None:
        key = storage_of(x)
        output = self._live[key] = _Output(conv, x)

        def forget(ref: Any) -> None:
            if self._live.get(key) is output:
                del self._live[key]

        output.ref = weakref.ref(x, forget)

    def _spoil(self, module: nn.Module, reason: str) -> None:
        self.spoiled.setdefault(module, reason)


def _hands_on(module: nn.Module) -> bool:
    kept_float = isinstance(module, Quantizer) and module.float_reason is not None
    return kept_float or isinstance(module, KEEPING)


def storage_of(x: Tensor) -> int:
    """Key that tensors have in common iff they share memory, while one of them lives."""
    return x.untyped_storage()._cdata


def hook_calls(
    module: nn.Module, enter: Callable[..., Any], leave: Callable[..., Any]
) -> list[Any]:
    """Lets two functions see the calls of a module; scripted ones, which take no hooks, are left.

    Args:
        module: The module.
        enter: Called before, with module, args and kwargs.
        leave: Called behind, with module, args, kwargs and result.

    Returns:
        List of handles, for :func:`remove_hooks`.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return []
    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, with_kwargs=True),
    ]


def remove_hooks(handles: list[Any]) -> None:
    """Removes hooks, and forgets their handles."""
    for handle in handles:
        handle.remove()
    handles.clear()


def tensors_in(x: Any) -> Iterator[Tensor]:
    """Yields the dense tensors in arguments or results, features of sparse ones included."""
    if isinstance(x, Tensor):
        if x.layout == torch.strided:
            yield x
    elif isinstance(x, (list, tuple)):
        for value in x:
            yield from tensors_in(value)
    elif isinstance(x, dict):
        yield from tensors_in(list(x.values()))
    elif isinstance(getattr(x, 'features', None), Tensor):
        yield x.features
