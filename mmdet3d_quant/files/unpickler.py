"""Unpickles data and no code: tensors, arrays, plain containers and mmengine's log buffers.

Any other class is not even imported: a placeholder stands for its objects.
"""

from __future__ import annotations

import codecs
import pickle
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals


class Inert:
    """Stands for an object of a class that is not read, whatever is done to it.

    Attributes:
        named: The class.
        state: What the pickle sets the object's attributes to, as data; None if it does not.
    """

    named = ''
    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignores an entry, as pickle fills lists."""

    def extend(self, values: Any) -> None:
        """Ignores entries, as pickle fills lists."""

    def add(self, value: Any) -> None:
        """Ignores an entry, as pickle fills sets."""


def _array_globals() -> dict[str, Any]:
    """Lists the globals in pickles of NumPy's arrays, scalars and types, of NumPy 1 and 2."""
    rebuild, scalar = np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    by_path: dict[str, Any] = {'numpy.ndarray': np.ndarray, 'numpy.dtype': np.dtype}
    for core in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        by_path[f'{core}._reconstruct'] = rebuild
        by_path[f'{core}.scalar'] = scalar
    for kind in {type(np.dtype(code)) for code in '?bBhHiIlLqQefdFDSU'}:
        by_path[f'{kind.__module__}.{kind.__name__}'] = kind
    return by_path


class _Buffer(HistoryBuffer):
    """Stand-in for a log buffer of mmengine that turns into one when its state is set.

    The state also names methods of the class; they are ignored, as the class has them.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set_default_statistics()
        self.__dict__.update({k: v for k, v in state.items() if k != 'statistics_methods'})
        self.__class__ = HistoryBuffer  # type: ignore[assignment]


class _Call:
    """Wraps a function or class that a pickle may call but not change.

    A pickle can set attributes of a class that it names, which changes it for the process.
    """

    __slots__ = ('_target',)

    def __init__(self, target: Callable[..., Any]) -> None:
        self._target = target

    def __call__(self, *args: Any) -> Any:
        return self._target(*_unwrapped(args))

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f'sets attributes of {self._target}')


def _unwrapped(value: Any) -> Any:
    if isinstance(value, _Call):
        return value._target
    return tuple(map(_unwrapped, value)) if type(value) is tuple else value


#: Beside torch's own: arrays and harmless containers.
_KNOWN: dict[str, Any] = {
    **_array_globals(),
    '_codecs.encode': codecs.encode,  # how protocol 2 spells bytes
    **{
        f'{module}.{kind.__name__}': kind
        for module in ('builtins', '__builtin__')
        for kind in (set, frozenset, slice, complex, bytearray, range)
    },
}
_KNOWN['__builtin__.xrange'] = range
_BUFFER = 'mmengine.logging.history_buffer.HistoryBuffer'
#: More modules, or one inside the other, has no model; a file can name one module many times.
_MODULES, _DEPTH = 100_000, 100
_PASSING = '_non_persistent_buffers_set'
_GETATTR = ('builtins.getattr', '__builtin__.getattr')


class DataUnpickler(pickle.Unpickler):
    """Rebuilds tensors, arrays and plain containers; everything else becomes :class:`Inert`."""

    strange: set[str]

    def find_class(self, module: str, name: str) -> Any:
        """Resolves a class or function that a pickle names: a known one, else a placeholder."""
        key = f'{module}.{name}'
        if key == _BUFFER:
            return _Buffer
        if key in _GETATTR or key.startswith(f'{_BUFFER}.'):
            return _Call(self._attribute)
        known = _get_allowed_globals().get(key, _KNOWN.get(key))
        if known is None:
            self.strange.add(key)
            return type('Inert', (Inert,), dict(named=key))
        return _Call(known) if callable(known) else known

    def _attribute(self, owner: Any = _Buffer, name: str = '') -> Any:
        """Replaces ``getattr``: methods of a log buffer are not needed, others not read."""
        if owner is not _Buffer:
            self.strange.add(f'getattr(..., {name!r})')
        return Inert()


def data_pickle(strange: set[str]) -> Any:
    """Makes a pickle module as ``torch.load`` wants one.

    Args:
        strange: Gets the names of the classes and functions that were not read.
    """
    kind = type('_Unpickler', (DataUnpickler,), dict(strange=strange))
    return SimpleNamespace(
        __name__='data_pickle',
        Unpickler=kind,
        load=lambda file, **kwargs: kind(file, **kwargs).load(),
    )


def pickled_weights(module: Any) -> dict[str, Tensor] | None:
    """Collects the weights of a module that was pickled whole, as its ``state_dict()`` names them.

    Args:
        module: What was read; the module and those inside it are placeholders.

    Returns:
        Names and tensors; None if it is no module, has none, or is too large to be a model.
    """
    found: dict[str, Tensor] = OrderedDict()
    stack: list[tuple[str, Any, tuple[int, ...]]] = [('', module, ())]
    for _ in range(_MODULES):
        if not stack:
            return found or None
        prefix, node, above = stack.pop()
        if not isinstance(node, Inert) or id(node) in above:
            continue
        if len(above) == _DEPTH:
            break
        left_out = node.state.get(_PASSING) if isinstance(node.state, dict) else None
        left_out = left_out if isinstance(left_out, set) else set()
        for name, value in [*_held(node, '_parameters'), *_held(node, '_buffers')]:
            if isinstance(value, Tensor) and name not in left_out:
                found[f'{prefix}{name}'] = value
        children = [(f'{prefix}{n}.', c, (*above, id(node))) for n, c in _held(node, '_modules')]
        stack.extend(reversed(children))
    return None


def _held(module: Inert, key: str) -> list[tuple[str, Any]]:
    """The parameters, buffers or children of a module that is a placeholder."""
    value = module.state.get(key) if isinstance(module.state, dict) else None
    return list(value.items()) if isinstance(value, dict) else []
