"""Ranges of UINT8, which files have where a tensor is never negative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mmdet3d_quant.calibration.choose import search
from mmdet3d_quant.calibration.result import Choice
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.core.spec import Method, QuantSpec
from mmdet3d_quant.core.unsigned import UnsignedSpec, set_unsigned_amax


def note_unsigned_ranges(choices: Sequence[Choice], active: Mapping[str, Quantizer]) -> None:
    """Searches the range of each INT8 unit in 255 steps, too, where ``mse`` has chosen its range.

    The other methods give one range whatever the steps, or were chosen for what the layer makes
    of it.

    Args:
        choices: The ranges, which the quantizers have.
        active: Quantizers by name; the ranges for UINT8 are noted in them.
    """
    chosen = [c for c in choices if c.unit.spec == QuantSpec() and c.method.endswith('mse')]
    found = search([replace(c.unit, spec=UnsignedSpec()) for c in chosen], Method('mse'))
    for choice, amax in strict_zip(chosen, found):
        for name in choice.unit.names:
            set_unsigned_amax(active[name], amax)
