"""Adds and concats inside a forward of somebody else, with their operands quantized.

A forward that was not written for it has no place for a quantizer between identity and add. Here
the module's class becomes a child of it whose forward watches the functions that it calls: where
one is an add or a concat that has a quantizer, its operands are rounded first.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from types import FrameType
from typing import Any, Tuple

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmdet3d_quant.core.joined import mark
from mmdet3d_quant.core.quantizer import Quantizer

#: Where in the code: module and line. Not the instruction: Python 3.11 and newer rewrite those that
#: have run a few times, and several adds of one line are told apart by their order.
Place = Tuple[str, int]
#: A place, and how often it was reached before in the same call of a forward.
Site = Tuple[Place, int]


def _functions(holder: Any, names: Sequence[str]) -> set[Any]:
    return {getattr(holder, name) for name in names if hasattr(holder, name)}


#: As Python calls them for ``a + b``, ``a += b``, ``sum`` and by name.
ADDS = _functions(torch, ['add'])
ADDS |= _functions(Tensor, ['add', 'add_', '__add__', '__iadd__', '__radd__'])
_IN_PLACE = _functions(Tensor, ['add_', '__iadd__'])
CONCATS = _functions(torch, ['cat', 'concat', 'concatenate'])
#: Attribute of a module with the quantizers of its adds and concats.
JOINS = 'quant_joins'


@dataclass(frozen=True)
class Found:
    """Ties that were found in a module; names of quantizers are relative to it.

    Attributes:
        groups: As ``quant_ties`` has them; see :mod:`mmdet3d_quant.core.ties`.
        inputs: As ``input_readers``.
        outputs: As ``output_readers``.
    """

    groups: list[list[str]]
    inputs: list[list[str]]
    outputs: list[list[str]]


class Joining:
    """Mixin of a module whose adds and concats have quantizers, or whose ties were found."""

    _sites: dict[Site, tuple[str, tuple[int, ...] | None]]
    _found: Found

    def quant_ties(self) -> list[list[str]]:
        """Lists the groups that share a scale."""
        return self._found.groups

    def input_readers(self) -> list[list[str]]:
        """Lists the quantizers that read each input."""
        return self._found.inputs

    def output_readers(self) -> list[list[str]]:
        """Lists the quantizers that read each output, too."""
        return self._found.outputs

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles by the float type: the child has no name to be found by."""
        return _new, (type(self).__bases__[1],), self.__dict__


def make_joining(module: nn.Module, found: Found | None = None) -> Any:
    """Makes the class of a module a child of what it is, with the parts of :class:`Joining`.

    Args:
        module: Any module.
        found: Its ties; none by default.

    Returns:
        The module.
    """
    if not isinstance(module, Joining):
        kind: Any = type(module)
        module.__class__ = joining_type(kind)
        vars(module).update(_sites={}, _found=Found([], [], []))
    if found is not None:
        vars(module).update(_found=found)
    return module


def add_join(owner: nn.Module, site: Site, name: str, operands: Any) -> str:
    """Puts a quantizer before an add or a concat in the forward of a module.

    Args:
        owner: The module.
        site: Where in its forward.
        name: Of the quantizer, such as ``'add0'``.
        operands: Numbers of the operands to round; None: all.

    Returns:
        str, the name of the quantizer in the module.

    Raises:
        ValueError: If the module computes its forward again in the backward pass.
    """
    if getattr(owner, 'with_cp', False):
        raise ValueError(
            f'{type(owner).__name__} with with_cp=True computes its forward again where its adds '
            'and concats are not seen: set with_cp=False, or leave them float with joins=False'
        )
    make_joining(owner)
    if not hasattr(owner, JOINS):
        setattr(owner, JOINS, nn.ModuleDict())
    quantizer = Quantizer(label=f'{name} of {type(owner).__name__}').train(owner.training)
    getattr(owner, JOINS)[name] = quantizer
    vars(owner)['_sites'][site] = name, None if operands is None else tuple(operands)
    return f'{JOINS}.{name}'


@lru_cache(maxsize=None)
def joining_type(kind: Any) -> Any:
    """Makes the child of a module's type whose forward rounds before adds and concats."""
    forward = kind.forward

    def rounding(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Rounding(self):
            return forward(self, *args, **kwargs)

    # torch.compile follows no function mode, and would leave the rounding out.
    apart = torch._dynamo.disable(rounding)

    @wraps(forward)
    def joined(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._sites:
            return forward(self, *args, **kwargs)
        # torch 2.2 traces nothing that its compiler was told to leave out.
        return (rounding if torch.jit.is_tracing() else apart)(self, *args, **kwargs)

    body = dict(forward=joined, __module__=kind.__module__, __doc__=kind.__doc__)
    return type(kind.__name__, (Joining, kind), body)


def _new(kind: type) -> Any:
    made = joining_type(kind)
    return made.__new__(made)


class _Rounding(TorchFunctionMode):
    """Rounds, while entered, the operands of the adds and concats of a module."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.owner = owner
        self.places = {place for place, _ in owner._sites}
        self.turns: Counter[Place] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ADDS or func in CONCATS:
            frame = calling_frame(sys._getframe(1))
            place = place_of(frame)
            if place in self.places and holder_of(frame) is self.owner:
                operands = operands_of(func, args, kwargs)
                if operands is not None:
                    site = place, self.turns[place]
                    self.turns[place] += 1
                    if site in self.owner._sites:
                        return self._rounded(func, operands, args, kwargs, site)
        return func(*args, **kwargs)

    def _rounded(self, func: Any, operands: list, args: Any, kwargs: dict, site: Site) -> Any:
        name, chosen = self.owner._sites[site]
        quantizer = getattr(self.owner, JOINS)[name]
        rounded = range(len(operands)) if chosen is None else chosen
        in_place = func in _IN_PLACE and 0 in rounded
        read = list(operands)
        if in_place and torch.is_grad_enabled() and quantizer.mode == 'quant':
            read[0] = read[0].clone()  # the quantizer's backward pass wants it as it is
        new = [quantizer(x) if i in rounded else x for i, x in enumerate(read)]
        if all(a is b for a, b in zip(new, operands)):
            return func(*args, **kwargs)
        rest = {k: v for k, v in kwargs.items() if k not in ('tensors', 'other')}
        if func in CONCATS:
            joined = func(new, *args[1:], **rest)
            if len({x.dtype for x in operands}) == 1:  # or some are rounded to another type, too
                mark(joined, quantizer)
            return joined
        if in_place:
            return operands[0].copy_(torch.add(*new, **rest))
        return func(*new, *args[2:], **rest)


def calling_frame(frame: FrameType) -> FrameType:
    """Finds the frame of the code that called a function, behind other modes that saw the call."""
    while frame.f_code.co_name == '__torch_function__' and frame.f_back is not None:
        frame = frame.f_back
    return frame


def place_of(frame: FrameType) -> Place:
    """Finds where in the code a frame is."""
    return frame.f_globals.get('__name__', ''), frame.f_lineno


def holder_of(frame: FrameType | None) -> Any:
    """Finds the module in whose method, or in a function called by it, a frame is."""
    while frame is not None:
        holder = frame.f_locals.get('self')
        if isinstance(holder, nn.Module):
            return holder
        frame = frame.f_back
    return None


def operands_of(func: Any, args: Any, kwargs: Any) -> list[Tensor] | None:
    """Finds the tensors that an add or a concat joins.

    Returns:
        List of tensors; None if they are not two or more of one type, and of one shape in an add.
    """
    if func in CONCATS:
        found = list(args[0] if args else kwargs.get('tensors', ()))
        return found if len(found) > 1 and all(map(_is_float, found)) else None
    found = list(args[:2]) if len(args) > 1 else [*args, kwargs.get('other')]
    alike = all(map(_is_float, found)) and found[0].shape == found[1].shape
    return found if alike else None


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
