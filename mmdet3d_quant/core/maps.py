"""The maps by which a detector is judged: what its heads read and, if quantized, return."""

from __future__ import annotations

from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import tensors
from mmdet3d_quant.core.coverage import HEADS
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.modes import quantizers


def heads(model: nn.Module) -> list[nn.Module]:
    """Lists the children of a model that are heads, by their names."""
    return [m for name, m in model.named_children() if fnmatchcase(name, HEADS)]


class judged_maps(AbstractContextManager):  # noqa: N801 - reads as a function
    """Keeps the judged maps of a forward while the context is entered.

    Of every head (a child called ``*_head``) these are the tensors that it reads. If layers of it
    are quantized, also the maps that it returns, tensors of four or more dimensions; lists of boxes
    and queries are none, since two runs may choose others. What follows the maps sees them without
    gradient. A model without heads is judged by what it returns; pass that to :meth:`returned`.

    Args:
        model: A detector, or any module.

    Attributes:
        maps: The maps in the order in which they appeared.
    """

    def __init__(self, model: nn.Module) -> None:
        self.maps: list[Tensor] = []
        self._heads = heads(model)
        self._kind = type(model).__name__
        self._handles: list[Any] = []

    def __enter__(self) -> judged_maps:
        for head in self._heads:
            inside = any(q.float_reason is None for q in quantizers(head).values())
            self._handles.append(
                head.register_forward_pre_hook(self._reading(not inside), with_kwargs=True)
            )
            if inside:
                self._handles.append(head.register_forward_hook(self._made))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def returned(self, output: Any) -> list[Tensor]:
        """Takes what the model returned; gives the maps.

        Raises:
            QuantError: If there is none.
        """
        if not self._heads and not self.maps:
            self.maps = [x for x in tensors(output) if x.is_floating_point()]
        if not self.maps:
            raise QuantError(
                f'{self._kind} cannot be judged: no head (a part called *_head) was called with a '
                'map, and it returns no tensor'
            )
        return self.maps

    def _reading(self, last: bool) -> Any:
        def hook(head: nn.Module, args: Any, kwargs: Any) -> Any:
            self.maps += [x for x in tensors((args, kwargs)) if x.is_floating_point()]
            return (detached(args), detached(kwargs)) if last else None

        return hook

    def _made(self, head: nn.Module, args: Any, output: Any) -> Any:
        self.maps += [x for x in tensors(output) if x.is_floating_point() and x.dim() > 3]
        return detached(output)


def detached(value: Any) -> Any:
    """Takes the gradient off the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (list, tuple):
        return type(value)(detached(item) for item in value)
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    return value


def relative_noise(maps: list[Tensor], exact: list[Tensor]) -> float:
    """Computes the squared error of maps over their square, the mean of all maps.

    Args:
        maps: Maps of a quantized model.
        exact: Those of the float model, of the same shapes.

    Returns:
        float, 0 for equal maps; ``-10 log10`` of it is the SQNR in dB.

    Raises:
        QuantError: If the maps differ in number or shape.
    """
    if [m.shape for m in maps] != [m.shape for m in exact]:
        raise QuantError('the maps of the float and the quantized model differ in shape')
    total = 0.0
    for found, wanted in strict_zip(maps, exact):
        error = torch.linalg.vector_norm(found.double() - wanted.double()).item() ** 2
        power = torch.linalg.vector_norm(wanted.double()).item() ** 2
        if error:
            total += error / power if power else float('inf')
    return total / len(exact)
