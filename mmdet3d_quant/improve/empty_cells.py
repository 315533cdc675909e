"""Empty cells: the value that a channel has over all of them becomes a whole number of steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet3d_quant.calibration.gather import gather_batches
from mmdet3d_quant.calibration.observe import Forward, run
from mmdet3d_quant.calibration.result import Choice
from mmdet3d_quant.core.copies import deep_copy
from mmdet3d_quant.core.formats import UINT8
from mmdet3d_quant.core.joined import untouched
from mmdet3d_quant.core.modes import evaluating, set_mode
from mmdet3d_quant.core.unsigned import set_unsigned_amax
from mmdet3d_quant.layers.conv import QuantConv2d
from mmdet3d_quant.layers.pairs import problem_alone

#: Least share of a channel's cells that hold one value, to the :data:`FINE` th of a step.
SHARE, FINE = 0.1, 16
#: A value below half a step is lifted to the first step by this factor at most.
LIFT = 32.0


@dataclass(frozen=True)
class Row:
    """A quantized convolution behind a batch norm and a ReLU, called in this order only.

    Attributes:
        parent: The ``Sequential`` that calls them.
        norm: The batch norm.
        conv: The convolution.
    """

    parent: nn.Module
    norm: Any
    conv: QuantConv2d


class EmptyCells:
    """Step after the ranges that puts the value of empty cells on a number of the format.

    Over cells without points a channel holds one value. Rounding moves it alike in all of them, and
    the next convolution adds that up over its inputs. So a factor per channel goes into the batch
    norm before and out of the convolution's weight, by which that value is a whole number of steps.
    The float model stays as it is, but for the rounding of float32. Ranges of inputs stay; those of
    the weights are taken anew.

    Served are convolutions in INT8 that follow a batch norm and a ReLU in an ``nn.Sequential``, as
    in SECOND.

    Args:
        weights: How ranges of weights are chosen, as :func:`mmdet3d_quant.calibrate` takes it.
        forward: Likewise.

    Attributes:
        changed: By convolution the mean error of its empty channels, in steps, before.
    """

    def __init__(self, weights: str = 'max', forward: Forward | None = None) -> None:
        self.weights, self.forward = weights, forward or run
        self.changed: dict[str, float] = {}

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, choices: list[Choice], held_out: list[tuple[int, Any]]
    ) -> None:
        """Changes a calibrated model in place; with several processes all alike.

        Args:
            model: Calibrated.
            choices: Not read.
            held_out: Numbered batches, of which the first one is looked at.

        Raises:
            ValueError: If there is no batch.
        """
        rows = dict(find_rows(model))
        own = min(held_out, key=lambda item: item[0], default=None)
        seen = {} if own is None else {own[0]: self._factors(model, rows, own[1])}
        first = next(iter(gather_batches(seen, 'empty cells need').values()))
        self.changed = {}
        for name, (factor, error) in first.items():
            norm, conv = rows[name].norm, rows[name].conv
            factor = factor.to(conv.weight)
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            conv.weight.div_(factor.view(1, -1, 1, 1))
            conv._weight_quantizer.amax = conv.weight_amax(self.weights)
            _refine(conv._input_quantizer)
            self.changed[name] = error

    def __str__(self) -> str:
        text = f'empty cells of {len(self.changed)} inputs put on steps of their ranges'
        if self.changed:
            worst = max(self.changed, key=self.changed.__getitem__)
            text += f'; they were off by up to {self.changed[worst]:.2f} steps ({worst}, mean)'
        return text

    def _factors(
        self, model: nn.Module, rows: dict[str, Row], batch: Any
    ) -> dict[str, tuple[Tensor, float]]:
        """Factors per channel, and the mean error before, of convolutions with empty cells."""
        found: dict[str, tuple[Tensor, float]] = {}
        calls: Counter = Counter()

        def look(name: str) -> Any:
            def hook(conv: QuantConv2d, args: Any) -> None:
                calls[conv] += 1
                made = factors(args[0], conv._input_quantizer)
                if made is not None:
                    found[name] = made

            return hook

        parents = {row.parent for row in rows.values()}
        hooks = [r.conv.register_forward_pre_hook(look(name)) for name, r in rows.items()]
        hooks += [p.register_forward_pre_hook(lambda m, _: calls.update([m])) for p in parents]
        try:
            with set_mode(model, 'float'), evaluating(model):
                self.forward(model, deep_copy(batch))
        finally:
            for hook in hooks:
                hook.remove()
        once = {n for n, r in rows.items() if calls[r.conv] == calls[r.parent] == 1}
        return {name: made for name, made in found.items() if name in once}


def find_rows(model: nn.Module) -> Iterator[tuple[str, Row]]:
    """Finds the convolutions that can be served, by name."""
    places = Counter(c for m in model.modules() for c in m._modules.values())
    for name, parent in model.named_modules():
        if type(parent).forward is not nn.Sequential.forward:
            continue
        children = list(parent.named_children())
        for at in range(len(children) - 2):
            (_, norm), (_, relu), (last, conv) = children[at : at + 3]
            if (
                isinstance(norm, _BatchNorm)
                and norm.affine
                and problem_alone(norm) is None
                and isinstance(relu, nn.ReLU)
                and isinstance(conv, QuantConv2d)
                and conv.groups == 1
                and conv._input_quantizer.mode == conv._weight_quantizer.mode == 'quant'
                and conv._input_quantizer.spec.format.even
                and all(untouched(m) and places[m] == 1 for m in (norm, relu, conv))
            ):
                yield (f'{name}.{last}' if name else last), Row(parent, norm, conv)


def _refine(quantizer: Any) -> None:
    """Makes the steps of UINT8 a whole part of the quantizer's own, for files that have them."""
    own = quantizer.spec.format
    parts = UINT8.qmax // own.qmax
    set_unsigned_amax(quantizer, float(quantizer.amax) / own.qmax / parts * UINT8.qmax)


def factors(x: Tensor, quantizer: Any) -> tuple[Tensor, float] | None:
    """Computes the factor that puts each channel's value of empty cells on a step.

    Args:
        x: (batch, channels, height, width), not negative.
        quantizer: What rounds it; calibrated.

    Returns:
        (channels,), 1 where the cells of a channel differ or hold 0; and the mean distance of the
        others' values from a step, in steps. None if there is nothing to change.
    """
    step = quantizer.spec.format.step(quantizer.amax).to(x)
    steps = x.transpose(0, 1).flatten(1) / step
    fine = (steps * FINE).round()
    usual = fine.mode(1, keepdim=True).values
    same = fine == usual
    value = (steps * same).sum(1) / same.sum(1)
    room = quantizer.spec.format.qmax / steps.amax(1)
    nearest = value.round()
    lifted = (nearest == 0) & (value * room.clamp(max=LIFT) >= 1)
    target = torch.where(lifted, torch.ones_like(value), nearest)
    empty = (same.double().mean(1) >= SHARE) & (usual[:, 0] > 0)
    if not bool((empty & (target > 0)).any()):
        return None
    factor = torch.where(empty & (target > 0), target / value, torch.ones_like(value))
    error = (value - nearest).abs()[empty].mean()
    return factor.cpu(), float(error)
