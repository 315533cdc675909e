"""Blocks of a model whose weights are rounded together: one tensor in, one tensor out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from mmdet3d_quant.core.copies import tensors
from mmdet3d_quant.core.modes import evaluating, set_mode
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.pairs import find_pairs

#: What a block is: a module with several layers, as a residual block, or each layer.
LEVELS = ('block', 'layer')
#: Largest number of layers of a block: those of a residual bottleneck.
MOST_LAYERS = 4
#: What may follow a layer in its block.
_AFTER = (_BatchNorm, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid)
#: What a block may be made of: each value of its output depends on values nearby only.
_LOCAL = (_ConvNd, *_AFTER, nn.Identity, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, Quantizer)


@dataclass(frozen=True)
class Block:
    """Modules that a model calls one after the other, each with what the former returned.

    Attributes:
        name: Name of the first.
        modules: Their names.
        layers: Names of the quantized layers inside whose weights are learned.
        calls: How often a forward calls it.
    """

    name: str
    modules: tuple[str, ...]
    layers: tuple[str, ...]
    calls: int

    def chain(self, model: nn.Module) -> nn.Sequential:
        """Joins the modules of a model into one that calls them."""
        return nn.Sequential(*(model.get_submodule(name) for name in self.modules))


def find_blocks(
    model: nn.Module,
    layers: Mapping[str, QuantLayer],
    run: Callable[[nn.Module], Any],
    by: str = 'block',
) -> list[Block]:
    """Divides layers into blocks, seen on a forward.

    A block is the module around up to :data:`MOST_LAYERS` layers, if that takes and gives one
    tensor, is made of convolutions, norms and activations, and is called as a whole; else a layer
    with the norm and activation that follow it in a ``Sequential``, or the batch norm that alone
    reads it.

    Args:
        model: A calibrated model; as before afterwards.
        layers: By name, those to be learned.
        run: Runs the model once.
        by: One of :data:`LEVELS`.

    Returns:
        The blocks in the order in which they are called; layers that were not called are in none.
    """
    calls, simple = _watch(model, run)
    with evaluating(model):
        norms = dict(find_pairs(model, run, quantized=False).folding)
    names = {module: name for name, module in model.named_modules()}
    chosen = set(layers.values())
    found = []
    for chain in _chains(model, chosen, calls, simple, by):
        if len(chain) == 1 and chain[0] in norms:
            chain = [*chain, norms[chain[0]]]
        inside = [m for module in chain for m in module.modules() if m in chosen]
        if calls[chain[0]]:
            path = tuple(names[m] for m in chain)
            found.append(Block(path[0], path, tuple(names[m] for m in inside), calls[chain[0]]))
    order = {names[module]: at for at, module in enumerate(calls)}
    return sorted(found, key=lambda block: order[block.name])


def _watch(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[Counter, set[nn.Module]]:
    """Counts the calls of each module, in the order of the first.

    Returns:
        The counts, and the modules that took one tensor and gave one each time.
    """
    calls: Counter = Counter()
    others: set[nn.Module] = set()

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[module] += 1
        if len(list(tensors((args, kwargs)))) != 1 or not (args and isinstance(args[0], Tensor)):
            others.add(module)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            others.add(module)

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after))
    try:
        with set_mode(model, 'float'), evaluating(model), torch.no_grad():
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, set(calls) - others


def _chains(
    module: nn.Module, chosen: set[Any], calls: Counter, simple: set[nn.Module], by: str
) -> Iterator[list[nn.Module]]:
    """Yields the modules of each block inside a module."""
    if not any(m in chosen for m in module.modules()):
        return
    if isinstance(module, QuantLayer) or _whole(module, calls, simple, by):
        yield [module]
        return
    last: list[nn.Module] | None = None
    in_order = type(module).forward is nn.Sequential.forward and calls[module] > 0
    for child in module.children():
        if last is not None and in_order and isinstance(child, _AFTER):
            last.append(child)
            continue
        if last is not None:
            yield last
            last = None
        inside = list(_chains(child, chosen, calls, simple, by))
        if inside and inside[-1] == [child]:
            last = inside.pop()
        yield from inside
    if last is not None:
        yield last


def _whole(module: nn.Module, calls: Counter, simple: set[nn.Module], by: str) -> bool:
    """Tells whether a module that is no layer is a block of its own."""
    if type(module).forward is nn.Sequential.forward or module not in simple:
        return False
    leaves = [m for m in module.modules() if not list(m.children()) or isinstance(m, QuantLayer)]
    inner = [_num_layers(child) for child in module.children()]
    most = MOST_LAYERS if by == 'block' else 1
    once = {calls[m] for m in module.modules() if isinstance(m, QuantLayer)}
    return (
        sum(inner) <= most
        and max(inner) == 1
        and once == {calls[module]}
        and all(isinstance(m, _LOCAL) for m in leaves)
    )


def _num_layers(module: nn.Module) -> int:
    return sum(isinstance(m, QuantLayer) for m in module.modules())
