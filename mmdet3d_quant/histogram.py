"""Statistics of a tensor: a histogram whose counts are exact however it was gathered."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mmdet3d_quant.amax import search_amax
from mmdet3d_quant.spec import Method, QuantSpec

NUM_BINS = 4096
#: histc counts in float32: chunks of this size keep every count exact.
_CHUNK = 2**24


class NonFiniteError(ValueError):
    """A tensor to calibrate on contains NaN or infinity."""


class Histogram:
    """Histogram of absolute values over ``[0, 2**exponent)`` in 4096 bins of equal width.

    The limit is always a power of two and grows by whole doublings, for which bins merge in
    pairs: nothing is lost or interpolated, memory is constant, and neither the order of the
    batches nor how they are split among collectors changes the counts. It takes the place of a
    pytorch-quantization calibrator (``collect``, ``reset``, ``compute_amax``).

    Args:
        name: How errors call the tensor.

    Attributes:
        counts: int64 of shape (4096,).
        exponent: The range is ``2**exponent``; None before the first non-zero value.
        amax: Largest absolute value seen, exact.
        num_elements: Number of values seen.
        num_batches: Number of tensors seen.
    """

    def __init__(self, name: str = 'tensor') -> None:
        self.name = name
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.counts = torch.zeros(NUM_BINS, dtype=torch.int64)
        self.exponent: int | None = None
        self.amax = 0.0
        self.num_elements = 0
        self.num_batches = 0

    def collect(self, x: Tensor) -> None:
        """Adds a tensor.

        Args:
            x: Floating tensor of any shape, dtype and device.

        Raises:
            NonFiniteError: If it contains NaN or infinity; nothing is added then.
        """
        x = x.detach().float().abs().flatten()
        if x.numel() == 0:
            return
        largest = float(x.max())
        if not math.isfinite(largest):
            bad = int((~torch.isfinite(x)).sum())
            raise NonFiniteError(
                f'{self.name} is the first tensor with NaN or infinity ({bad} of {x.numel()} '
                'values): check the input data and the weights before this layer'
            )
        if largest > 0:
            # frexp: largest = m * 2**e with m in [0.5, 1), so largest < 2**e strictly.
            self._grow(math.frexp(largest)[1])
        limit = 2.0 ** (self.exponent if self.exponent is not None else 0)
        for chunk in x.split(_CHUNK):
            hist = torch.histc(chunk, NUM_BINS, 0, limit)
            self.counts += hist.to('cpu', torch.int64)
        self.amax = max(self.amax, largest)
        self.num_elements += x.numel()
        self.num_batches += 1

    def merge(self, other: Histogram) -> None:
        """Adds the statistics of another histogram, exactly; ``other`` is not changed."""
        counts = other.counts
        if other.exponent is not None:
            counts = _coarsen(counts, self._grow(other.exponent) - other.exponent)
        self.counts += counts
        self.amax = max(self.amax, other.amax)
        self.num_elements += other.num_elements
        self.num_batches += other.num_batches

    def compute_amax(self, method: str | Method, spec: QuantSpec | None = None) -> float | None:
        """Range by ``method``, None if no tensor was seen; see :func:`search_amax`."""
        if not self.num_batches:
            return None
        method = Method.parse(method)
        if method.name == 'max' or self.exponent is None:
            return self.amax
        hist, edges = self.trimmed()
        return search_amax(hist, edges, method, spec or QuantSpec())

    def trimmed(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts and edges up to the bin that holds the largest value.

        Returns:
            int64 counts of shape (n,) and float64 edges of shape (n + 1,), n <= 4096.
        """
        width = 2.0 ** (self.exponent or 0) / NUM_BINS
        n = min(int(self.amax / width) + 1, NUM_BINS)
        return self.counts[:n].numpy(), np.arange(n + 1) * width

    def _grow(self, exponent: int) -> int:
        """Makes the range at least ``2**exponent``; returns its exponent."""
        if self.exponent is None:  # only zeros so far: they are in bin 0 at any range
            self.exponent = exponent
        if exponent > self.exponent:
            self.counts = _coarsen(self.counts, exponent - self.exponent)
            self.exponent = exponent
        return self.exponent


def _coarsen(counts: Tensor, doublings: int) -> Tensor:
    """Counts of the same values when the range is doubled ``doublings`` times."""
    group = min(2**doublings, NUM_BINS)
    out = torch.zeros_like(counts)
    out[: NUM_BINS // group] = counts.view(-1, group).sum(1)
    return out
