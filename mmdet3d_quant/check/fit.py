"""Whether the range of every quantizer fits the tensor that it rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdet3d_quant.check.runs import run_torch, sqnr
from mmdet3d_quant.core.modes import quantizers, set_mode
from mmdet3d_quant.export.cuts import Cut

#: Least SQNR of a tensor rounded with its range.
RANGE_DB = 10.0
#: How many quantizers a message names.
SHOWN = 3


@dataclass(frozen=True)
class Fit:
    """How a range fits a tensor.

    Attributes:
        sqnr: Of the tensor rounded with the range, in dB.
        limit: Where the range ends; of a weight, the largest range of a channel.
        largest: Largest absolute value of the tensor.
    """

    sqnr: float
    limit: float
    largest: float

    def __str__(self) -> str:
        text = f'{self.sqnr:.1f} dB, range to {self.limit:.3g}, values to {self.largest:.3g}'
        if 0 < self.largest < self.limit:
            bits = max(math.log2(256 * self.largest / self.limit), 0)
            text += f': uses {bits:.1f} of 8 bits'
        return text


@torch.no_grad()
def range_fits(cut: Cut) -> dict[str, Fit]:
    """Measures how the range of every quantizer of a cut fits its tensor in the float model.

    Args:
        cut: The cut, with its inputs; its quantizers in any mode.

    Returns:
        Dict of :class:`Fit` by name of the quantizer, the worst of its calls, in the order of the
        first ones; without quantizers that have no range or are not called.
    """
    fits: dict[str, Fit] = {}

    def watch(name: str) -> Callable:
        def hook(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
            found = _fit(quantizer, args[0])
            if name not in fits or not found.sqnr >= fits[name].sqnr:
                fits[name] = found

        return hook

    hooks = [
        q.register_forward_pre_hook(watch(n))
        for n, q in quantizers(cut.module).items()
        if q.calibrated
    ]
    try:
        run_torch(cut, 'float')
    finally:
        for hook in hooks:
            hook.remove()
    return fits


def _fit(quantizer: nn.Module, x: Tensor) -> Fit:
    with set_mode(quantizer, 'quant'):
        value = sqnr(x.cpu(), quantizer.forward(x).cpu())
    return Fit(value, float(quantizer._amax.max()), float(x.abs().max()))


def range_fault(fits: Mapping[str, Fit]) -> str:
    """Describes the quantizers that leave less than :data:`RANGE_DB`; empty if none does."""
    bad = {name: fit for name, fit in fits.items() if not fit.sqnr >= RANGE_DB}
    if not bad:
        return ''
    return f'{len(bad)} range(s) do not fit (least: {RANGE_DB:.0f} dB): {worst_fits(bad)}'


def worst_fits(fits: Mapping[str, Fit]) -> str:
    """Lists the quantizers whose ranges fit worst, NaN first."""
    order = sorted(fits, key=lambda n: (not math.isnan(fits[n].sqnr), fits[n].sqnr))
    return '; '.join(f'{name}: {fits[name]}' for name in order[:SHOWN]) or 'none'
