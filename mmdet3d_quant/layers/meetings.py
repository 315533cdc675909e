"""Where tensors meet in a module, seen while it runs once: adds, concats, several readers of one.

What is found becomes ties (:mod:`mmdet3d_quant.core.ties`) and, where an add or a concat has no
quantizer yet, one that rounds its operands (:mod:`mmdet3d_quant.layers.joining`).
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from mmdet3d_quant.core.copies import tensors
from mmdet3d_quant.core.macs import weighted
from mmdet3d_quant.core.modes import constant_parameters, evaluating, quantizers, set_mode
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.joining import (
    ADDS,
    CONCATS,
    Site,
    calling_frame,
    holder_of,
    operands_of,
    place_of,
)
from mmdet3d_quant.layers.watch import Calls

#: A tensor: what becomes of it in place is another one.
Key = Tuple[int, int]

_METHODS = (
    'view', 'reshape', 'flatten', 'permute', 'transpose', 'contiguous', 'squeeze', 'unsqueeze',
    'unflatten', 'swapaxes', 'clone', 'detach', 'roll', 'view_as', 'reshape_as',
)  # fmt: skip
#: Functions whose result has values of their input alone, so that the grid of one is that of the
#: other: other shapes, other orders, the largest of some.
_KEEPING = {getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)}
_KEEPING |= {getattr(torch, name) for name in _METHODS if hasattr(torch, name)}
_KEEPING |= {F.max_pool1d, F.max_pool2d, F.max_pool3d, F.pixel_shuffle, F.pixel_unshuffle}
_KEEPING |= {torch.max_pool1d, torch.max_pool2d, torch.max_pool3d}


@dataclass
class Meeting:
    """An add or a concat of tensors that depend on the inputs.

    Attributes:
        kind: ``'add'`` or ``'cat'``.
        owner: Name of the module in whose forward it is.
        site: Where in the code.
        operands: The tensors.
        result: Likewise.
    """

    kind: str
    owner: str
    site: Site
    operands: list[Key]
    result: Key


@dataclass
class Seen:
    """What one run of a module has shown; tensors by the one whose values they have.

    Attributes:
        meetings: In order.
        readers: Names of the quantizers that read a tensor.
        others: How many functions and layers read it without one, adds and concats apart.
        uses: How many read it at all.
        makers: Name of the layer that made it, batch norm behind it included.
        inputs: The tensors that the module got.
        outputs: Those that it returned.
        returned: What it returned, without gradients.
        reached: Names of the layers that were called.
        foreign: Names of the layers whose weight something else has read.
    """

    meetings: list[Meeting] = field(default_factory=list)
    readers: dict[Key, list[str]] = field(default_factory=lambda: defaultdict(list))
    others: Counter = field(default_factory=Counter)
    uses: Counter = field(default_factory=Counter)
    makers: dict[Key, str] = field(default_factory=dict)
    inputs: list[Key] = field(default_factory=list)
    outputs: list[Key] = field(default_factory=list)
    returned: Any = None
    reached: set = field(default_factory=set)
    foreign: set = field(default_factory=set)


def watch_meetings(
    model: nn.Module, inputs: Sequence[Any], run: Callable[..., Any] | None = None
) -> Seen:
    """Runs a module once in float, and notes which tensors meet.

    Args:
        model: Any module; unchanged afterwards.
        inputs: Arguments of its forward: tensors, and lists of them.
        run: ``run(*inputs)`` instead of ``model(*inputs)``.

    Returns:
        :class:`Seen`.
    """
    with constant_parameters(model):  # so that what needs a gradient depends on the inputs
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
            with set_mode(model, 'float'), _Watch(model) as watch:
                given = [_live(x) for x in inputs]
                watch.begin(given)
                watch.end((run or model)(*given))
    return watch.seen


class _Watch(Calls, TorchFunctionMode):
    """Records into ``seen`` while entered."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        super().__init__(self._names)
        self.seen = Seen()
        self._layers = {module: name for name, module in weighted(model).items()}
        self._quantizers = {q: name for name, q in quantizers(model).items()}
        weights = ((id(getattr(m, 'weight', None)), m) for m in self._layers)
        self._weights: dict[int, nn.Module] = dict(weights)
        self._roots: dict[Key, Key] = {}
        self._kept: list[Tensor] = []  # or an id is given twice

    def begin(self, inputs: Any) -> None:
        self.seen.inputs = [self._root(x) for x in tensors(inputs)]

    def end(self, outputs: Any) -> None:
        self.seen.outputs = [self._root(x) for x in tensors(outputs)]
        self.seen.uses.update(self.seen.outputs)
        self.seen.returned = _mapped(outputs, lambda x: x.detach())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.innermost in self._layers:  # its own arithmetic
            return func(*args, **kwargs)
        given = list(tensors((args, kwargs)))
        read = [self._root(x) for x in given if x.requires_grad]  # in place, it changes
        site = self._site(func, args, kwargs, calling_frame(sys._getframe(1)))
        result = func(*args, **kwargs)
        made = [self._key(x) for x in tensors(result) if x.requires_grad]
        if not read or not made or all(key in read for key in made):  # or handed on
            return result
        self._look_for_weights(given)
        if _keeps_values(func, args, kwargs):
            self._roots[made[0]] = read[0]
            return result
        self.seen.uses.update(read)
        if site is not None and (func in CONCATS or len(read) == 2):
            kind = 'cat' if func in CONCATS else 'add'
            owner = self._names[self.running[-1][0]]
            self.seen.meetings.append(Meeting(kind, owner, site, read, made[0]))
        else:
            self.seen.others.update(read)
        return result

    def _site(self, func: Any, args: Any, kwargs: Any, frame: FrameType) -> Site | None:
        """Where a meeting is; None for other functions, and in a module that is not running."""
        if func not in ADDS and func not in CONCATS or not self.running:
            return None
        module, turns = self.running[-1]
        if operands_of(func, args, kwargs) is None or holder_of(frame) is not module:
            return None
        place = place_of(frame)
        turns[place] += 1
        return place, turns[place] - 1

    def _look_for_weights(self, given: list[Tensor]) -> None:
        for x in given:
            owner = self._weights.get(id(x))
            if owner is not None and owner not in [module for module, _ in self.running]:
                self.seen.foreign.add(self._layers[owner])

    def entering(self, module: nn.Module, args: Any, kwargs: Any) -> Counter:
        """Notes who reads what; returns a counter of the turns at each place of its forward."""
        with torch._C.DisableTorchFunction():
            read = [self._root(x) for x in tensors((args, kwargs)) if x.requires_grad]
        if module in self._quantizers:
            self.seen.uses.update(read)
            for key in read:
                self.seen.readers[key].append(self._quantizers[module])
        elif module in self._layers:
            self.seen.reached.add(self._layers[module])
            if not isinstance(module, QuantLayer):
                self.seen.others.update(read)
                self.seen.uses.update(read)
        return Counter()

    def leaving(self, module: nn.Module, args: Any, kwargs: Any, result: Any, note: Any) -> None:
        """Notes what a layer made."""
        with torch._C.DisableTorchFunction():
            read = [self._root(x) for x in tensors(args) if x.requires_grad]
            made = [self._key(x) for x in tensors(result) if x.requires_grad]
        makers = self.seen.makers
        if module in self._layers:
            makers.update(dict.fromkeys(made, self._layers[module]))
        elif isinstance(module, _BatchNorm) and len(read) == len(made) == 1:
            if read[0] in makers and self.seen.uses[read[0]] == 1:
                makers[made[0]] = makers[read[0]]

    def _key(self, x: Tensor) -> Key:
        self._kept.append(x)
        return id(x), x._version

    def _root(self, x: Tensor) -> Key:
        key = self._key(x)
        return self._roots.get(key, key)


def _live(x: Any) -> Any:
    """Copies an input such that all that is computed from it needs a gradient."""
    return _mapped(x, lambda t: t.detach().requires_grad_().clone())


def _mapped(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Changes the floating tensors in lists and tuples."""
    if isinstance(x, Tensor):
        return change(x) if x.is_floating_point() else x
    if type(x) in (list, tuple):
        return type(x)(_mapped(item, change) for item in x)
    return x


def _keeps_values(func: Any, args: Any, kwargs: dict) -> bool:
    if func is F.interpolate:
        mode = kwargs.get('mode', args[3] if len(args) > 3 else 'nearest')
        return mode in ('nearest', 'nearest-exact')
    return func in _KEEPING
