"""Ranges in training: those of weights follow the weights, those of activations may be learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import copy_all
from mmdet3d_quant.core.formats import MIN_AMAX
from mmdet3d_quant.core.grouped import WeightGroup, fits
from mmdet3d_quant.core.joined import cover, tie
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.core.ties import ties
from mmdet3d_quant.layers.base import QuantLayer


class WeightRanges:
    """Keeps the ratio of each weight range to the largest weight that calibration chose.

    Args:
        model: A calibrated model.
        ratios: Range over largest weight by layer, as :attr:`ratios` of a former run; taken from
            the model where a layer is missing.

    Attributes:
        ratios: By name of the layer, float32 of the shape of its range; 1 for ranges by ``max``,
            and for channels without weights.
    """

    def __init__(self, model: nn.Module, ratios: dict[str, Tensor] | None = None) -> None:
        self._layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, QuantLayer) and layer._weight_quantizer.calibrated
        }
        self.ratios: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            amax = layer._weight_quantizer._amax
            if ratios and name in ratios:
                self.ratios[name] = ratios[name].to(amax)
                continue
            largest = layer.weight_amax()
            self.ratios[name] = torch.where(largest > 0, amax / largest, torch.ones_like(amax))
        self._covering = {name: bool((ratio >= 1).all()) for name, ratio in self.ratios.items()}
        self._groups: list[WeightGroup] | None = None
        self._alone: dict[str, QuantLayer] = {}

    @torch.no_grad()
    def follow(self) -> None:
        """Recomputes all ranges from the weights, without synchronisation with a GPU."""
        if self._groups is None:
            self._groups, self._alone = self._grouped()
        for group in self._groups:
            group.follow()
        for name, layer in self._alone.items():
            quantizer = layer._weight_quantizer
            quantizer._amax.copy_(layer.weight_amax() * self.ratios[name])
            if self._covering[name]:
                cover(layer.weight, quantizer._amax)

    def _grouped(self) -> tuple[list[WeightGroup], dict[str, QuantLayer]]:
        """Makes groups of the weights on GPUs; returns them and the other layers."""
        by_kind: dict[Any, list[str]] = {}
        for name, layer in self._layers.items():
            if fits(layer):
                kind = layer.weight.device, layer._weight_quantizer.spec
                by_kind.setdefault(kind, []).append(name)
        groups = [
            WeightGroup([self._layers[n] for n in names], [self.ratios[n] for n in names])
            for names in by_kind.values()
        ]
        taken = {name for names in by_kind.values() for name in names}
        return groups, {n: layer for n, layer in self._layers.items() if n not in taken}

    def of(self, state: Mapping[str, Tensor], prefix: str = '') -> dict[str, Tensor]:
        """Computes the ranges of the weights in a state dict.

        Args:
            state: State dict of the model, or of a copy with other weights.
            prefix: What the names of the model's layers begin with there.

        Returns:
            Range by its key in the state dict, on the device of the weight.
        """
        ranges = {}
        for name, layer in self._layers.items():
            path = f'{prefix}{name}.' if name else prefix
            if f'{path}weight' in state:
                limit = layer.largest(state[f'{path}weight'])
                ranges[f'{path}_weight_quantizer._amax'] = limit * self.ratios[name].to(limit)
        return ranges


class LearnedRanges:
    """Lets an optimizer train ranges, one per tie group, by their logarithm.

    Ranges of one model differ by orders of magnitude, and steps of Adam do not depend on the size
    of gradients: one learning rate serves all only if a step changes a range by a share of it. So
    the optimizer is given the gradient by ``ln(amax)``, and its step is applied to ``ln(amax)``
    (as in TQT, Jain et al., 2020). Ranges stay above zero. Members of a tie group get the sum of
    their gradients and leave every step equal. A member that is frozen moves with the others.

    Args:
        model: A calibrated model, some ranges of which are parameters.

    Raises:
        ValueError: If some members of a group are learned and others are not.
    """

    def __init__(self, model: nn.Module) -> None:
        active = {n: q for n, q in quantizers(model).items() if q.float_reason is None}
        tied = ties(model)
        for group in tied:
            fixed = [name for name in group if not active[name].learned]
            if 0 < len(fixed) < len(group):
                raise ValueError(
                    f'only some ranges of a tie group are learned, not that of {fixed[0]}: give '
                    f'learn_amax=True to all models of {", ".join(group)}, or to none'
                )
        members = {name for group in tied for name in group}
        groups = [*tied, *((name,) for name in active if name not in members)]
        groups = [group for group in groups if active[group[0]].learned]
        self._names = [group[0] for group in groups]
        self._groups = [[active[n]._amax for n in group] for group in groups]
        self._before: list[Tensor] = []
        self._start = [group[0].detach().clone() for group in self._groups]
        self._called = False
        self._handles: list[Any] = []

    def __len__(self) -> int:
        return len(self._groups)

    def attach(self, optimizer: Optimizer) -> None:
        """Registers step hooks on an optimizer that has all the ranges."""
        self._handles = [
            optimizer.register_step_pre_hook(self._prepare),
            optimizer.register_step_post_hook(self._apply),
        ]
        for group in self._groups:
            if all(member.equal(group[0]) for member in group):
                tie(group)

    def stop(self) -> None:
        """Removes the step hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def vanished(self) -> list[str]:
        """Lists quantizers, one of each group, whose range training has moved to nothing."""
        found = strict_zip(self._names, strict_zip(self._groups, self._start))
        return [n for n, (g, start) in found if bool(g[0] < MIN_AMAX) and bool(start >= MIN_AMAX)]

    def check(self) -> None:
        """Checks, after a step, that the hooks were called.

        Raises:
            RuntimeError: If ranges moved without them. torch below 2.4 takes the step hooks off
                all optimizers when something is compiled for the first time.
        """
        if self._called:
            return
        if any(not _lead(g).equal(start) for g, start in strict_zip(self._groups, self._start)):
            raise RuntimeError(
                "the optimizer's step hooks are not called, without which learned ranges go wrong: "
                f'torch.compile takes them off below torch 2.4 (here: {torch.__version__}). Take a '
                'newer torch, leave out `compile` in the config, or train with fixed ranges '
                '(learn_amax=False)'
            )

    @torch.no_grad()
    def _prepare(self, *_: Any) -> None:
        """Replaces gradients by those of ``ln(amax)``, summed over each group."""
        self._called = True
        self._before = _copies([_lead(group).detach() for group in self._groups])
        cases = []
        for group, before in strict_zip(self._groups, self._before):
            grads = [member.grad for member in group if member.grad is not None]
            if grads:
                cases.append((group, before, grads))
        if not cases:
            return
        totals = _copies([grads[0] for _, _, grads in cases])
        for k in range(1, max(len(grads) for _, _, grads in cases)):
            more = [
                (t, grads[k]) for t, (_, _, grads) in strict_zip(totals, cases) if k < len(grads)
            ]
            torch._foreach_add_(*map(list, strict_zip(*more)))
        torch._foreach_mul_(totals, [before for _, before, _ in cases])
        members = [(m, t) for (g, _, _), t in strict_zip(cases, totals) for m in g]
        for (member, _), total in strict_zip(members, _copies([t for _, t in members])):
            member.grad = total if member.requires_grad else None

    @torch.no_grad()
    def _apply(self, *_: Any) -> None:
        """Applies the step to ``ln(amax)`` and copies the result to all members of a group."""
        if not self._groups:
            return
        moved = torch._foreach_sub([_lead(group).detach() for group in self._groups], self._before)
        torch._foreach_exp_(moved)
        after = torch._foreach_mul(self._before, moved)
        pairs = [(m, new) for group, new in strict_zip(self._groups, after) for m in group]
        copy_all([m for m, _ in pairs], [new for _, new in pairs])
        for group in self._groups:
            tie(group)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Clones tensors, on a GPU in one launch."""
    return list(torch._foreach_mul(tensors, 1.0))


def require_ranges(state: dict[str, Tensor], learned: LearnedRanges | None) -> None:
    """Raises if a training that diverged has left ranges that are none.

    Args:
        state: State dict of the model, which is about to be saved.
        learned: Its learned ranges.

    Raises:
        RuntimeError: Names quantizers whose range is NaN, infinite or nothing.
    """
    ranges = {k: v for k, v in state.items() if k.rpartition('.')[2] == '_amax'}
    lost = [name[: -len('._amax')] for name, v in ranges.items() if not bool(v.isfinite().all())]
    lost += learned.vanished() if learned is not None else []
    if lost:
        shown = ', '.join(lost[:5]) + (f' and {len(lost) - 5} more' if len(lost) > 5 else '')
        raise RuntimeError(
            f'training has diverged, and no checkpoint is saved: the ranges of {shown} are NaN, '
            'infinite or 0. Go on from the last checkpoint or the start with a lower learning rate '
            '(of the ranges: lr_mult of _amax) or with optim_wrapper.clip_grad'
        )


def _lead(group: list[Tensor]) -> Tensor:
    """The member of a tie group that the optimizer moves: the first that is not frozen."""
    return next((member for member in group if member.requires_grad), group[0])
