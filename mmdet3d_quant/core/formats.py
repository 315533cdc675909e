"""Number formats: which numbers a tensor is rounded to, how, and what files call them.

A format counts in steps: ``x / step`` is rounded to one of its numbers. To add one, write a
subclass of :class:`Format` that rounds, and its line in :data:`FORMATS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Dict, Tuple, Union

import numpy as np
import torch
from torch import Tensor

#: Ranges below this are treated as this: a step must never be zero or denormal. It is the
#: threshold under which pytorch-quantization, too, calls a range empty (2**-24).
MIN_AMAX = 2.0**-24

#: Key of :data:`FORMATS`, pytorch-quantization's ``num_bits``: of integers their width, of floating
#: numbers the bits of exponent and mantissa.
Bits = Union[int, Tuple[int, int]]


@dataclass(frozen=True)
class Format:
    """The integers from ``qmin`` to ``qmax``; subclasses have other numbers.

    Attributes:
        name: How prints, errors and manifests call it.
        bits: Width of one number.
        qmin: Smallest number.
        qmax: Largest number, at which ``amax`` lies.
        dtype: torch's type of the stored numbers; None if its exporter has none.
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
    #: The smallest number above zero.
    least: ClassVar[float] = 1
    #: Whether all numbers are one step apart.
    even: ClassVar[bool] = True

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

    def bits_used(self, peak: float) -> float:
        """Computes how many bits the numbers up to a peak take, with their sign.

        Args:
            peak: Largest absolute value, in steps.

        Returns:
            Bits, ``self.bits`` at most; 0 if all round to zero.
        """
        levels = self.levels()
        index = int(torch.bucketize(float(peak), (levels[1:] + levels[:-1]) / 2, right=True))
        return min(math.log2(index + 1) + 1, self.bits) if index else 0.0

    def encoded(self, steps: np.ndarray) -> bytes:
        """Rounds values in steps, and gives them as a file stores them.

        Args:
            steps: Floating array of any shape.

        Returns:
            A byte per value, in the order of the array.
        """
        return self.rounded(steps).astype(np.int8 if self.qmin < 0 else np.uint8).tobytes()

    def num_levels(self) -> int:
        """Counts :meth:`levels`, for methods that need them one step apart.

        Raises:
            ValueError: If they are not.
        """
        if not self.even:
            raise ValueError(f'entropy is for numbers one step apart, not {self.name}: take mse')
        return len(self.levels())


@dataclass(frozen=True)
class E4M3(Format):
    """Floating numbers of 4 bits of exponent and 3 of mantissa, without infinity: FP8.

    They are those of torch's and ONNX's ``float8_e4m3fn``, up to 448, at which values saturate. So
    infinity becomes 448 here, as a QuantizeLinear has it, and not NaN.
    """

    fused: ClassVar[bool] = False
    least: ClassVar[float] = 2.0**-9
    even: ClassVar[bool] = False

    def round_(self, steps: Tensor, rectify: bool = False) -> Tensor:
        """As :meth:`Format.round_`; adding a number with that many more places rounds to 3."""
        bits, exponent, places = _DOUBLE if steps.dtype == torch.float64 else _SINGLE
        steps.clamp_(0 if rectify else self.qmin, self.qmax)
        above = steps.view(bits).bitwise_and(exponent).view(steps.dtype)
        above.clamp_(min=2.0**-6).mul_(1.5 * 2.0**places)
        return steps.copy_((steps + above).sub_(above).copysign_(steps))

    def levels(self) -> Tensor:
        """As :meth:`Format.levels`; the index of a number is its code in eight bits."""
        mantissa = torch.arange(8, dtype=torch.float64)
        normal = [(1 + mantissa / 8) * 2.0**e for e in range(-6, 9)]
        return torch.cat([mantissa * self.least, *normal])[:-1]  # the last code is NaN

    def encoded(self, steps: np.ndarray) -> bytes:
        """As :meth:`Format.encoded`; the first bit is the sign."""
        value = self.rounded(steps)
        code = np.searchsorted(self.levels().numpy(), np.abs(value))
        return (code + 128 * np.signbit(value)).astype(np.uint8).tobytes()


#: Of float32 and float64: integers as wide, the bits of the exponent, the mantissa's beyond 3.
_SINGLE = torch.int32, 0x7F800000, 20
_DOUBLE = torch.int64, 0x7FF0000000000000, 49


def _signed(bits: int) -> Format:
    return Format(f'int{bits}', bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


INT8 = Format('int8', 8, -128, 127, torch.int8, 'INT8')
#: What the exporter makes of INT8 where a tensor is never negative; no quantizer is told so.
UINT8 = Format('uint8', 8, 0, 255, torch.uint8, 'UINT8')

FP8 = E4M3('fp8', 8, -448, 448, onnx='FLOAT8E4M3FN')

#: What a quantizer can be told, by ``num_bits``.
FORMATS: Dict[Bits, Format] = {
    **{bits: _signed(bits) for bits in range(2, 8)},
    8: INT8,
    (4, 3): FP8,
}
#: What files can hold, by ONNX's name.
STORED: Dict[str, Format] = {f.onnx: f for f in (*FORMATS.values(), UINT8) if f.onnx}
