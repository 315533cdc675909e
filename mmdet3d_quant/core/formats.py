"""Number formats: which numbers a tensor is rounded to, how, and what files call them.

A format counts in steps: ``x / step`` is rounded to one of its numbers. To add one, write a
subclass of :class:`Format` that rounds, and its line in :data:`FORMATS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Dict

import numpy as np
import torch
from torch import Tensor

#: Ranges below this are treated as this: a step must never be zero or denormal. It is the
#: threshold under which pytorch-quantization, too, calls a range empty (2**-24).
MIN_AMAX = 2.0**-24

#: Key of :data:`FORMATS`, pytorch-quantization's ``num_bits``.
Bits = int


@dataclass(frozen=True)
class Format:
    """The integers from ``qmin`` to ``qmax``; subclasses have other numbers.

    Attributes:
        name: How prints, errors and manifests call it.
        bits: Width of one number.
        qmin: Smallest number.
        qmax: Largest number, at which ``amax`` lies.
        dtype: torch's type of the stored numbers; None if there is none.
        onnx: Name of ONNX's type; None if it cannot be exported.
    """

    name: str
    bits: int
    qmin: int
    qmax: int
    dtype: torch.dtype | None = None
    onnx: str | None = None

    #: Whether torch's fake-quantize operators compute it.
    fused: ClassVar[bool] = True

    def step(self, amax: Tensor) -> Tensor:
        """Computes the step size, ``amax / qmax``, kept away from zero by :data:`MIN_AMAX`.

        Args:
            amax: Range limit(s), floating, any shape, >= 0.

        Returns:
            Tensor of the shape and dtype of ``amax``, > 0.
        """
        return amax.clamp(min=MIN_AMAX) / self.qmax

    def round_(self, steps: Tensor, rectify: bool = False) -> Tensor:
        """Rounds values in steps to the nearest numbers, in place; halves go to even.

        Args:
            steps: Floating tensor of any shape.
            rectify: Round ``relu(steps)`` instead.

        Returns:
            ``steps``.
        """
        return steps.round_().clamp_(0 if rectify else self.qmin, self.qmax)

    def rounded(self, steps: np.ndarray) -> np.ndarray:
        """Computes :meth:`round_` of an array, as a new one of its shape and dtype."""
        return self.round_(torch.from_numpy(np.array(steps))).numpy()

    def levels(self) -> Tensor:
        """The numbers that are not negative, ascending from 0; float64."""
        return torch.arange(self.qmax + 1, dtype=torch.float64)

    def num_levels(self) -> int:
        """Counts :meth:`levels`, for methods that need them one step apart.

        Raises:
            ValueError: If they are not.
        """
        count = len(self.levels())
        if count != self.qmax + 1:
            raise ValueError(f'entropy is for numbers one step apart, not {self.name}: take mse')
        return count


def _signed(bits: int) -> Format:
    return Format(f'int{bits}', bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


INT8 = Format('int8', 8, -128, 127, torch.int8, 'INT8')
#: What the exporter makes of INT8 where a tensor is never negative; no quantizer is told so.
UINT8 = Format('uint8', 8, 0, 255, torch.uint8, 'UINT8')

#: What a quantizer can be told, by ``num_bits``.
FORMATS: Dict[Bits, Format] = {**{bits: _signed(bits) for bits in range(2, 8)}, 8: INT8}
#: What files can hold, by ONNX's name.
STORED: Dict[str, Format] = {f.onnx: f for f in (*FORMATS.values(), UINT8) if f.onnx}
