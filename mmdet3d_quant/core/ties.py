"""Ties: groups of quantizers that share one scale.

Where two integer tensors meet (a residual add, a concat), or where several layers read one
tensor, an engine inserts a conversion unless the scales are equal. So quantizers are tied into
groups. A module declares the groups inside it, as names relative to itself:

* ``quant_ties() -> list[list[str]]``

and, so that modules that pass tensors to each other can be tied from outside,

* ``output_readers() -> list[list[str]]``: for each of its outputs, its own quantizers that read
  that same tensor further inside;
* ``input_readers() -> list[list[str]]``: for each of its inputs, its quantizers that read it.

:data:`LINKS` says, by pattern, which modules pass their outputs to which. Groups that overlap are
united. A tie is only data: nothing is shared between the modules, every quantizer keeps a range
of its own, and calibration gives all members of a group an equal one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Iterable

import torch
from torch import nn

from mmdet3d_quant.core.modes import quantizers


@dataclass(frozen=True)
class Link:
    """All outputs of one module are, in order, the inputs of another.

    Attributes:
        source: Regular expression that matches the full name of the producer.
        target: Name of the consumer, a template for ``re.Match.expand``.
    """

    source: str
    target: str


#: `img_backbone` feeds `img_neck`, `pts_backbone` feeds `pts_neck`, `backbone` feeds `neck`, and
#: each neck its head. The parts of `export/cuts.py` are called so, too.
LINKS: list[Link] = [
    Link(r'(.*\.)?(\w+_)?backbone', r'\g<1>\g<2>neck'),
    Link(r'(.*\.)?(\w+_)?neck', r'\g<1>\g<2>bbox_head'),
]


def fed_by(source: str) -> list[str]:
    """Names of the modules that get the outputs of a module, as :data:`LINKS` says."""
    matches = ((link, re.fullmatch(link.source, source)) for link in LINKS)
    return [match.expand(link.target) for link, match in matches if match is not None]


def ties(model: nn.Module) -> list[tuple[str, ...]]:
    """Finds the groups of quantizers that share one scale.

    Args:
        model: Any module, usually the detector: ties between a backbone and a neck are only
            found from a module that contains both.

    Returns:
        Groups of two or more names, as in :func:`mmdet3d_quant.quantizers`, each group and the
        list in the order of registration. Quantizers kept float belong to none.

    Raises:
        ValueError: If a module declares a quantizer that it does not have.
    """
    active = {n: q for n, q in quantizers(model).items() if q.float_reason is None}
    known = set(quantizers(model))
    groups = _Groups(active)
    for names in _declared(model):
        unknown = [n for n in names if n not in known]
        if unknown:
            raise ValueError(f'a tie names {unknown[0]!r}, which is no quantizer of the model')
        groups.unite([n for n in names if n in active])
    return groups.result()


def unequal_ties(model: nn.Module) -> list[tuple[str, ...]]:
    """Finds the groups whose members are calibrated but do not have one and the same range."""
    by_name = quantizers(model)
    broken = []
    for group in ties(model):
        ranges = [q.amax for q in (by_name[n] for n in group) if q.amax is not None]
        if any(not r.equal(ranges[0]) for r in ranges[1:]):
            broken.append(group)
    return broken


def share_ranges(model: nn.Module) -> None:
    """Lets compiled code round a tensor once for all quantizers that are tied.

    Where members of a tie group have equal ranges, one stands for the others in what is compiled
    from now on, until somebody sets, loads or forgets a range. Whoever trains ranges keeps groups
    equal and adds up the gradients of the members
    (:class:`~mmdet3d_quant.qat.moving.LearnedRanges`). In one of several processes learned ranges
    stay apart, as DistributedDataParallel waits for a gradient of each.

    Args:
        model: A calibrated model.
    """
    by_name = quantizers(model)
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    for names in ties(model):
        group = [by_name[name] for name in names]
        first = group[0]
        alike = all(
            q.calibrated
            and q.spec == first.spec
            and q._amax.requires_grad == first._amax.requires_grad
            and q._amax.equal(first._amax)
            for q in group
        )
        if alike and (alone or not first.learned):
            for quantizer in group:
                quantizer.equals = group


def _declared(model: nn.Module) -> Iterable[list[str]]:
    """Yields all declared groups, as full names."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if hasattr(module, 'quant_ties'):
            yield from (_full(name, group) for group in module.quant_ties())
        for target_name in fed_by(name) if hasattr(module, 'output_readers') else ():
            target = modules.get(target_name)
            if target is None or not hasattr(target, 'input_readers'):
                continue
            pairs = zip(module.output_readers(), target.input_readers())
            for behind, ahead in pairs:
                yield _full(name, behind) + _full(target_name, ahead)


def _full(prefix: str, names: Iterable[str]) -> list[str]:
    return [f'{prefix}.{n}' if prefix else n for n in names]


class _Groups:
    """Union of overlapping groups, in the order of the names."""

    def __init__(self, names: Iterable[str]):
        self._group = {n: [n] for n in names}
        self._order = {n: i for i, n in enumerate(self._group)}

    def unite(self, names: list[str]) -> None:
        for name in names[1:]:
            first, other = self._group[names[0]], self._group[name]
            if first is not other:
                first.extend(other)
                self._group.update(dict.fromkeys(other, first))

    def result(self) -> list[tuple[str, ...]]:
        groups = {id(g): g for g in self._group.values() if len(g) > 1}
        ordered = [tuple(sorted(g, key=self._order.__getitem__)) for g in groups.values()]
        return sorted(ordered, key=lambda g: self._order[g[0]])
