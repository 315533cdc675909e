"""Statistics of a tensor: a histogram whose counts are exact however it was gathered."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Iterable, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from mmdet3d_quant.calibration.counting import BINS, BITS, OCTAVES, PER_OCTAVE, count
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.formats import MIN_AMAX

#: Bins of equal width of a :meth:`Histogram.view`.
NUM_BINS = 2 * PER_OCTAVE
#: The range is at least ``2**-24``, below which a scale does not follow it any more.
_LEAST = int(np.log2(MIN_AMAX))


class NonFiniteError(ValueError):
    """A tensor to calibrate on contains NaN or infinity."""


class Beyond(NamedTuple):
    """Values beyond a view of a histogram: their number, sum, and sum of squares."""

    number: float
    total: float
    squares: float


class Histogram:
    """Histogram of absolute values over ``[0, 2**exponent)``, 2048 equal bins per octave.

    The bins are the finer the smaller the values, so that a single large value does not take the
    resolution from all others: 16 octaves have bins of their own, and what lies below has as many
    again, of equal width. The limit is always a power of two and grows by whole doublings, for
    which bins merge: nothing is lost or interpolated, memory is constant, and neither the order
    of the batches nor how they are split among collectors or processes changes the counts. It
    takes the place of a pytorch-quantization calibrator (``collect``, ``reset``).

    All of it lives on the device of the tensors; only :meth:`collect` on a CPU looks at values,
    so that a GPU is never waited for.

    Args:
        name: Name of the tensor in error messages.

    Attributes:
        bins: int64 (34816,), counts from 0 up, as :func:`counting.count` has them.
        exponent: int32 with one element; the range is ``2**exponent``.
        lowest: Smallest value seen (signed), float32 with one element; infinity at first.
        highest: Largest value seen (signed).
        least_peak: Smallest of the tensors' largest absolute values.
        num_elements: Number of values seen.
        num_tensors: Number of tensors seen.
    """

    bins: Tensor
    exponent: Tensor
    lowest: Tensor
    highest: Tensor
    least_peak: Tensor

    def __init__(self, name: str = 'tensor') -> None:
        self.name = name
        self.reset()

    def reset(self) -> None:
        """Resets to the histogram of no tensors."""
        vars(self).update(_EMPTY)  # shared, as no tensor is changed in place
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
        # frexp: peak = m * 2**e with m in [0.5, 1), so peak < 2**e strictly; of zeros, the least e.
        result.exponent = torch.frexp(result.least_peak.clamp(min=MIN_AMAX / 2)).exponent
        result.bins = count(values, result.exponent)
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
        if other.bins.device.type == 'cpu':
            other.require_finite(self.name)
        self.merge(other)

    def merge(self, other: Histogram) -> None:
        """Adds another histogram, exactly; ``other`` is not changed."""
        if other.num_tensors == 0:
            return
        if self.num_tensors == 0:  # nothing of this one need be moved to the device of the other
            for name in (*TENSORS, 'num_elements', 'num_tensors'):
                setattr(self, name, getattr(other, name))
            return
        if self.bins.device != other.bins.device:
            self.to(other.bins.device)
        tensors = (tuple(getattr(h, name) for name in TENSORS) for h in (self, other))
        vars(self).update(strict_zip(TENSORS, _merged(*tensors)))
        self._count(other)

    def _count(self, other: Histogram) -> None:
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

    def view(self, octaves: int = 0) -> tuple[np.ndarray, float]:
        """Counts the values below ``2**(exponent - octaves)`` in 4096 bins of equal width.

        Args:
            octaves: How many octaves at the top to leave out, 0 to 15.

        Returns:
            int64 counts (4096,), and the width of a bin.
        """
        counts = self.bins.cpu().numpy()
        below, rest = counts[:PER_OCTAVE], counts[PER_OCTAVE:].reshape(OCTAVES, PER_OCTAVE)
        result = np.r_[below, rest[0]]
        for octave in rest[1 : OCTAVES - octaves]:
            result = np.r_[result.reshape(-1, 2).sum(1), octave]
        return result, 2.0 ** (int(self.exponent) - octaves) / NUM_BINS

    def beyond(self, octaves: int) -> Beyond:
        """Sums over the values that a :meth:`view` leaves out, at the centres of their bins."""
        first = PER_OCTAVE * (OCTAVES + 1 - octaves)
        counts = self.bins[first:].cpu().numpy().astype(np.float64)
        values = self.centers()[first:]
        return Beyond(counts.sum(), float(counts @ values), float(counts @ values**2))

    def widths(self) -> np.ndarray:
        """Widths of ``bins``, float64 (34816,)."""
        return 2.0 ** (int(self.exponent) - OCTAVES - BITS + _OCTAVE)

    def centers(self) -> np.ndarray:
        """Centres of ``bins``, float64 (34816,)."""
        return (np.arange(BINS) - _OCTAVE * PER_OCTAVE + 0.5) * self.widths()

    def trimmed(self, octaves: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Counts and edges up to the bin that holds the largest value.

        Args:
            octaves: See :meth:`view`; values beyond it are left out.

        Returns:
            int64 counts of shape (n,) and float64 edges of shape (n + 1,), n <= 4096.
        """
        counts, width = self.view(octaves)
        n = min(int(self.amax / width) + 1, NUM_BINS)
        return counts[:n], np.arange(n + 1) * width


_EMPTY = dict(
    bins=torch.zeros(BINS, dtype=torch.int64),
    exponent=torch.tensor(_LEAST, dtype=torch.int32),
    lowest=torch.tensor(float('inf')),
    highest=torch.tensor(float('-inf')),
    least_peak=torch.tensor(float('inf')),
)
TENSORS = tuple(_EMPTY)
#: Histograms that are merged together at most, which bounds the memory that takes.
_TOGETHER = 64
#: Octave of each bin above the lowest; what lies below has bins of the lowest's width.
_OCTAVE = np.repeat(np.r_[0, np.arange(OCTAVES)], PER_OCTAVE).astype(np.float64)


def merge_all(pairs: Iterable[tuple[Histogram, Histogram]]) -> None:
    """Merges the second histogram of each pair into the first; on a GPU in few launches for all.

    Args:
        pairs: Histograms as :meth:`Histogram.merge` takes them, no first one twice.
    """
    by_device: dict[torch.device, list[tuple[Histogram, Histogram]]] = {}
    for mine, other in pairs:
        device = other.bins.device
        if device.type == 'cpu' or mine.bins.device != device or not mine.num_tensors:
            mine.merge(other)
        elif other.num_tensors:
            by_device.setdefault(device, []).append((mine, other))
    for some in by_device.values():
        for i in range(0, len(some), _TOGETHER):
            _merge_stacked(some[i : i + _TOGETHER])


def _merge_stacked(pairs: list[tuple[Histogram, Histogram]]) -> None:
    """Merges pairs of one device, all by the same launches."""
    first, second = (
        [torch.stack([getattr(pair[i], name) for pair in pairs]) for name in TENSORS]
        for i in (0, 1)
    )
    for (mine, other), *tensors in strict_zip(pairs, *_merged(first, second)):
        vars(mine).update(strict_zip(TENSORS, tensors))
        mine._count(other)


def _merged(mine: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Merges the tensors of two histograms, or of stacks of histograms."""
    exponent = torch.maximum(mine[1], other[1])
    bins = _coarsen(mine[0], exponent - mine[1]) + _coarsen(other[0], exponent - other[1])
    lowest, highest = torch.minimum(mine[2], other[2]), torch.maximum(mine[3], other[3])
    return bins, exponent, lowest, highest, torch.minimum(mine[4], other[4])


def flat(x: Tensor) -> Tensor:
    """Flattens a tensor in the order of its memory, without a copy where possible."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(order).reshape(-1)


def _coarsen(bins: Tensor, doublings: Tensor) -> Tensor:
    """Merges bins for a limit that is doubled ``doublings`` times.

    An octave moves down by as many octaves. Where that is below the lowest one, its bins, which
    start at ``(2048 + j) << octave`` widths of the lowest bin, merge with those of equal width.
    """
    if bins.device.type == 'cpu' and bins.dim() == 1:
        return bins if not doublings else _scattered(bins, _places_on_cpu(int(doublings)))
    return _scattered(bins, _places(doublings[..., None]))


def _scattered(bins: Tensor, places: Tensor) -> Tensor:
    return torch.zeros_like(bins).scatter_add_(-1, places, bins)


def _places(doublings: Tensor) -> Tensor:
    """Where each bin goes, int64 (..., 34816), for doublings of shape (..., 1)."""
    index = torch.arange(BINS, device=doublings.device)
    octave = ((index >> BITS) - 1).clamp(min=0)
    start = index - octave * PER_OCTAVE
    moved = (octave - doublings).clamp(min=0)
    return moved * PER_OCTAVE + (start >> (doublings - octave).clamp(min=0, max=62))


@lru_cache(maxsize=64)
def _places_on_cpu(doublings: int) -> Tensor:
    return _places(torch.tensor([doublings]))
