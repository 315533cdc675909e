"""Statistics of a tensor: a histogram whose counts are exact however it was gathered."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdet3d_quant.calibration.counting import count
from mmdet3d_quant.core.spec import MIN_AMAX

NUM_BINS = 4096
_BITS = 12
#: The range is at least ``2**-24``, below which a scale does not follow it any more.
_LEAST = int(np.log2(MIN_AMAX))


class NonFiniteError(ValueError):
    """A tensor to calibrate on contains NaN or infinity."""


class Histogram:
    """Histogram of absolute values over ``[0, 2**exponent)`` in 4096 bins of equal width.

    The limit is always a power of two and grows by whole doublings, for which bins merge in
    pairs: nothing is lost or interpolated, memory is constant, and neither the order of the
    batches nor how they are split among collectors or processes changes the counts. It takes the
    place of a pytorch-quantization calibrator (``collect``, ``reset``).

    All of it lives on the device of the tensors; only :meth:`collect` on a CPU looks at values,
    so that a GPU is never waited for.

    Args:
        name: Name of the tensor in error messages.

    Attributes:
        counts: int64 (4096,).
        exponent: int32 with one element; the range is ``2**exponent``.
        lowest: Smallest value seen (signed), float32 with one element; infinity at first.
        highest: Largest value seen (signed).
        least_peak: Smallest of the tensors' largest absolute values.
        num_elements: Number of values seen.
        num_tensors: Number of tensors seen.
    """

    def __init__(self, name: str = 'tensor') -> None:
        self.name = name
        self.reset()

    def reset(self) -> None:
        """Resets to the histogram of no tensors."""
        self.counts = torch.zeros(NUM_BINS, dtype=torch.int64)
        self.exponent = torch.tensor(_LEAST, dtype=torch.int32)
        self.lowest = torch.tensor(float('inf'))
        self.highest = torch.tensor(float('-inf'))
        self.least_peak = torch.tensor(float('inf'))
        self.num_elements = 0
        self.num_tensors = 0

    @classmethod
    def of(cls, x: Tensor) -> Histogram:
        """Computes the histogram of one tensor of any shape, floating type and device.

        Where it contains NaN or infinity, so do ``lowest`` and ``highest``.
        """
        result = cls()
        values = flat(x.detach()).float()
        if values.numel() == 0:
            return result
        result.lowest, result.highest = torch.aminmax(values)
        result.least_peak = torch.maximum(-result.lowest, result.highest)
        result.num_elements, result.num_tensors = values.numel(), 1
        if values.device.type == 'cpu' and not result.finite:
            return result
        # frexp: peak = m * 2**e with m in [0.5, 1), so peak < 2**e strictly.
        result.exponent = torch.frexp(result.least_peak).exponent.clamp(min=_LEAST)
        result.counts = count(values, result.exponent, NUM_BINS)
        return result

    def collect(self, x: Tensor) -> None:
        """Adds a tensor.

        Raises:
            NonFiniteError: If it lies on a CPU and contains NaN or infinity; nothing is added
                then. Elsewhere :meth:`require_finite` tells, when asked.
        """
        self.add(Histogram.of(x))

    def add(self, other: Histogram) -> None:
        """Adds the statistics of a tensor, as :meth:`collect` does."""
        if other.counts.device.type == 'cpu':
            other.require_finite(self.name)
        self.merge(other)

    def merge(self, other: Histogram) -> None:
        """Adds another histogram, exactly; ``other`` is not changed."""
        if other.num_tensors == 0:
            return
        if self.counts.device != other.counts.device:
            self.to(other.counts.device)
        exponent = torch.maximum(self.exponent, other.exponent)
        self.counts = _coarsen(self.counts, exponent - self.exponent)
        self.counts = self.counts + _coarsen(other.counts, exponent - other.exponent)
        self.exponent = exponent
        self.lowest = torch.minimum(self.lowest, other.lowest)
        self.highest = torch.maximum(self.highest, other.highest)
        self.least_peak = torch.minimum(self.least_peak, other.least_peak)
        self.num_elements += other.num_elements
        self.num_tensors += other.num_tensors

    def to(self, device: torch.device | str) -> Histogram:
        """Moves everything, in place."""
        for name in TENSORS:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Returns everything but the name as CPU tensors and plain numbers."""
        state: dict[str, Any] = {name: getattr(self, name).cpu() for name in TENSORS}
        return dict(state, num_elements=self.num_elements, num_tensors=self.num_tensors)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the histogram from a :meth:`state_dict`."""
        vars(self).update(state)

    @property
    def amax(self) -> float:
        """Largest absolute value seen, exact; 0 without tensors."""
        return max(-float(self.lowest), float(self.highest), 0.0) if self.num_tensors else 0.0

    @property
    def finite(self) -> bool:
        """True if no NaN or infinity was seen."""
        return bool(torch.isfinite(self.lowest) & torch.isfinite(self.highest))

    def require_finite(self, name: str | None = None) -> None:
        """Checks that no NaN or infinity was seen.

        Args:
            name: Name of the tensor in the message, instead of the histogram's.

        Raises:
            NonFiniteError: If one was.
        """
        if self.num_tensors and not self.finite:
            raise NonFiniteError(
                f'{name or self.name} is the first tensor with NaN or infinity: check the input '
                'data and the weights before this layer'
            )

    def trimmed(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts and edges up to the bin that holds the largest value.

        Returns:
            int64 counts of shape (n,) and float64 edges of shape (n + 1,), n <= 4096.
        """
        width = 2.0 ** int(self.exponent) / NUM_BINS
        n = min(int(self.amax / width) + 1, NUM_BINS)
        return self.counts[:n].cpu().numpy(), np.arange(n + 1) * width


TENSORS = ('counts', 'exponent', 'lowest', 'highest', 'least_peak')


def flat(x: Tensor) -> Tensor:
    """Flattens a tensor in the order of its memory, without a copy where possible."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(order).reshape(-1)


def _coarsen(counts: Tensor, doublings: Tensor) -> Tensor:
    """Merges bins for a range that is doubled ``doublings`` times."""
    if counts.device.type == 'cpu' and not doublings:
        return counts
    bins = torch.arange(NUM_BINS, device=counts.device) >> doublings.clamp(max=_BITS)
    return torch.zeros_like(counts).scatter_add_(0, bins, counts)
