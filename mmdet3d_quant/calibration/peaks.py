"""Largest absolute values, by channel and by batch: what a range per tensor does not show."""

from __future__ import annotations

import math
from typing import Any, List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdet3d_quant.core.compat import strict_zip


class Peaks:
    """Largest absolute values that one quantizer read.

    A quantizer of a concat or an add reads several tensors in a batch, in the same order in every
    batch; each has a row. Merging is exact, in any order.

    Attributes:
        channels: Per tensor of a batch float32 (channels,), the largest absolute value of each
            channel over all batches. A tensor without a channel axis has one channel.
        parts: Per tensor how many of its channels each input of a concatenation brought; () of
            a tensor that is none.
        by_batch: Largest absolute value by number of the batch.
    """

    def __init__(self) -> None:
        self.channels: List[Tensor] = []
        self.parts: List[Tuple[int, ...]] = []
        self.by_batch: dict[int, Tensor] = {}

    def add(self, x: Tensor, axis: int, parts: Tuple[int, ...] = ()) -> None:
        """Adds the next tensor of a batch.

        Args:
            x: Of any shape and floating type.
            axis: Its channel axis.
            parts: Channels of each input, if it was concatenated.
        """
        self.channels.append(channel_peaks(x, axis))
        self.parts.append(parts)

    def number(self, batch: int) -> None:
        """Declares all that was added to be of one batch."""
        filled = [p for p in self.channels if p.numel()]
        if filled:
            self.by_batch = {batch: (torch.cat(filled) if filled[1:] else filled[0]).max()}

    def merge(self, other: Peaks) -> Peaks:
        """Returns the peaks of the batches of both; neither is changed."""
        total = Peaks()
        longer, shorter = sorted((self.channels, other.channels), key=len, reverse=True)
        total.channels = [*map(_largest, longer, shorter), *longer[len(shorter) :]]
        total.parts = max(self.parts, other.parts, key=len)
        total.by_batch = {**self.by_batch, **other.by_batch}
        return total

    def state_dict(self) -> dict[str, Any]:
        """Returns lists of CPU tensors and plain values."""
        return dict(
            channels=[p.cpu() for p in self.channels],
            parts=list(self.parts),
            by_batch={n: float(p) for n, p in self.by_batch.items()},
        )

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Peaks:
        """Rebuilds peaks from a :meth:`state_dict`."""
        result = cls()
        result.channels = list(state['channels'])
        result.parts = [tuple(sizes) for sizes in state['parts']]
        result.by_batch = {int(n): torch.tensor(float(p)) for n, p in state['by_batch'].items()}
        return result

    @property
    def inputs(self) -> list[Tensor]:
        """Channel peaks of every tensor; of a concatenated one, of each of its inputs."""
        split: list[Tensor] = []
        for peaks, sizes in strict_zip(self.channels, self.parts):
            split += peaks.split(list(sizes)) if sum(sizes) == len(peaks) else [peaks]
        return [p.cpu() for p in split]

    @property
    def batch(self) -> int | None:
        """Number of the batch with the largest value, the first of equals; None without any."""
        if not self.by_batch:
            return None
        return min(self.by_batch, key=lambda n: (-float(self.by_batch[n]), n))


def channel_peaks(x: Tensor, axis: int) -> Tensor:
    """Computes the largest absolute value of each channel, float32 (channels,)."""
    x = x.detach()
    if x.numel() == 0:
        return torch.zeros(0, device=x.device)
    if x.dim() < 2:
        return torch.maximum(x.max(), -x.min()).float().reshape(1)
    axis %= x.dim()
    others = [d for d in range(x.dim()) if d != axis]
    if axis == 1 and x.dim() > 2 and x.is_contiguous():  # rows of memory, which is faster
        x, others = x.flatten(2), [0, 2]
        return torch.maximum(x.amax(2).amax(0), -x.amin(2).amin(0)).float()
    return torch.maximum(x.amax(others), -x.amin(others)).float()


def bits_kept(peak: float, step: float) -> float:
    """Computes how many bits of a grid a tensor uses: those of its largest integer, and the sign.

    Args:
        peak: Largest absolute value of the tensor.
        step: Step of the grid.

    Returns:
        Bits; 0 where all values round to zero.
    """
    level = math.floor(peak / step + 0.5)
    return math.log2(level + 1) + 1 if level else 0.0


def _largest(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise maximum; a channel that only one of both has keeps its value."""
    if len(a) == len(b):
        return torch.maximum(a, b)
    size = max(len(a), len(b))
    return torch.maximum(F.pad(a, (0, size - len(a))), F.pad(b, (0, size - len(b))))
