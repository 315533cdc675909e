"""Watching one forward: which modules run, and what reads the outputs of convolutions."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet3d_quant.core.quantizer import Quantizer

#: Modules that, in eval mode, hand on the very tensor that they get.
KEEPING = (nn.Identity, _DropoutNd)


class Calls:
    """Follows, while entered, the calls of modules; to be the first parent of a mode of torch.

    Scripted modules, which take no hooks, are not seen.

    Args:
        modules: The modules.

    Attributes:
        running: Modules that are running, the innermost last, each with its note.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.running: list[tuple[nn.Module, Any]] = []
        self._modules = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
        self._handles: list[Any] = []

    def __enter__(self) -> Any:
        for module in self._modules:
            before = module.register_forward_pre_hook(self._before, with_kwargs=True)
            behind = module.register_forward_hook(self._behind, with_kwargs=True)
            self._handles += [before, behind]
        super().__enter__()  # type: ignore[misc]
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)  # type: ignore[misc]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def innermost(self) -> nn.Module | None:
        """The innermost module that is running."""
        return self.running[-1][0] if self.running else None

    def entering(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Looks at a call that begins; returns a note, which is kept while it lasts."""

    def leaving(self, module: nn.Module, args: Any, kwargs: Any, result: Any, note: Any) -> None:
        """Looks at a call that has ended, and at its note."""

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.running.append((module, self.entering(module, args, kwargs)))

    def _behind(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        last, note = self.running.pop()
        while last is not module:  # what an exception left behind
            last, note = self.running.pop()
        self.leaving(module, args, kwargs, result, note)


class _Output:
    """One output of a convolution, while it lives."""

    def __init__(self, conv: nn.Module, tensor: Tensor):
        self.conv, self.ref = conv, weakref.ref(tensor)


class Watch(Calls, TorchDispatchMode):
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
        watched = [m for m in model.modules() if isinstance(m, (*makers, readers))]
        others = [m for m in model.modules() if not (list(m.children()) or _hands_on(m))]
        super().__init__(dict.fromkeys([*watched, *others]))
        self.sources: dict[nn.Module, set[nn.Module | None]] = {}
        self.spoiled: dict[nn.Module, str] = {}
        self._makers, self._readers, self._dims = makers, readers, dims
        self._live: dict[int, _Output] = {}
        self._owners: dict[int, set[nn.Module]] = {}
        for module in watched:
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(storage_of(parameter), set()).add(module)

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
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
            if output is not None and not isinstance(self.innermost, self._readers):
                self._spoil(output.conv, f'its output is read by {func}, too')
            for owner in self._owners.get(key, ()) if self._foreign(key) else ():
                self._spoil(owner, f'its weights are read by {func} outside of it')
        return func(*args, **(kwargs or {}))

    def _foreign(self, key: int) -> bool:
        """Whether a parameter is read while none of the modules that own it is running."""
        return not self._owners.get(key, set()).intersection(m for m, _ in self.running)

    def entering(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Notes who reads the output of which maker."""
        for x in tensors_in((args, kwargs)):
            output = self._live.get(storage_of(x))
            if isinstance(module, self._readers):
                self.sources.setdefault(module, set()).add(None if output is None else output.conv)
            elif output is not None:
                self._spoil(output.conv, f'its output is read by a {type(module).__name__}, too')

    def leaving(self, module: nn.Module, args: Any, kwargs: Any, result: Any, note: Any) -> None:
        """Notes what a maker made."""
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
