"""Units of a model that are switched to float together, so that no tie is torn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from mmdet3d_quant.core.compat import removesuffix
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.core.ties import ties
from mmdet3d_quant.layers.base import QuantLayer

#: What a unit is made of before ties unite some.
LEVELS = ('layer', 'block', 'part')


@dataclass(frozen=True)
class Unit:
    """What becomes float together.

    Attributes:
        name: Name of the module that it is, or of its first one and how many more there are.
        members: Names of its layers, and of the quantizers of its adds and concats.
    """

    name: str
    members: tuple[str, ...]


def find_members(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Finds what can be float on its own: quantized layers, and quantizers of adds and concats.

    Args:
        model: Any module.

    Returns:
        Dict from the name of a layer, or of a quantizer that is of none, to the names of its
        quantizers, without those kept float; in the order of the model.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    members: dict[str, list[str]] = {}
    for name, quantizer in quantizers(model).items():
        if quantizer.float_reason is None:
            owner = name.rpartition('.')[0]
            members.setdefault(owner if owner in layers else name, []).append(name)
    return {name: tuple(inside) for name, inside in members.items()}


def find_units(model: nn.Module, level: str = 'layer') -> list[Unit]:
    """Divides the quantized layers of a model into units.

    Layers, blocks (the innermost module with several quantized layers that is no whole part) or
    parts (children of the model) that share a scale are one unit.

    Args:
        model: Any module.
        level: One of :data:`LEVELS`.

    Returns:
        The units, in the order of the model; every member is in one.

    Raises:
        ValueError: If the level is unknown, or nothing is quantized.
    """
    if level not in LEVELS:
        raise ValueError(f'unknown unit {level!r}: expected one of {", ".join(LEVELS)}')
    members = find_members(model)
    if not members:
        raise ValueError(f'{type(model).__name__} has no quantized layers: use Quant* types')
    home = {name: _home(model, name, members, level) for name in members}
    owner = {quantizer: name for name, inside in members.items() for quantizer in inside}
    for group in ties(model):
        first, *others = (home[owner[quantizer]] for quantizer in group)
        home = {name: first if at in others else at for name, at in home.items()}
    inside: dict[str, list[str]] = {}
    for name, at in home.items():
        inside.setdefault(at, []).append(name)
    return [Unit(_name(model, names, members), tuple(names)) for names in inside.values()]


def _home(model: nn.Module, name: str, members: Iterable[str], level: str) -> str:
    """Name of the layer, block or part that a member is in."""
    if level == 'layer':
        return name
    parts = name.split('.')
    if level == 'part':
        return parts[0]
    for end in range(len(parts) - 1, 1, -1):
        around = '.'.join(parts[:end])
        several = sum(other.startswith(f'{around}.') for other in members) > 1
        called = not isinstance(model.get_submodule(around), (nn.ModuleList, nn.ModuleDict))
        if several and called:
            return around
    return name


def _name(model: nn.Module, names: list[str], members: Iterable[str]) -> str:
    """Names some members: by the module that has exactly these inside, else by the first."""
    shown = [_short(model, name) for name in names]
    parts = names[0].split('.')
    for end in range(len(parts), 0, -1):
        around = '.'.join(parts[:end])
        inside = [n for n in members if n == around or n.startswith(f'{around}.')]
        if inside == names:
            return around if len(names) > 1 else shown[0]
    return f'{shown[0]} +{len(shown) - 1}'


def _short(model: nn.Module, name: str) -> str:
    """A member's name; of a concat or an add the module's instead of the quantizer's."""
    return removesuffix(name, '._input_quantizer') or type(model).__name__


def float_quantizers(units: Iterable[Unit], members: dict[str, tuple[str, ...]]) -> list[str]:
    """Lists the quantizers of some units."""
    return [q for unit in units for name in unit.members for q in members[name]]
