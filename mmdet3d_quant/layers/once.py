"""Rounding a tensor once, where it arises, for all quantizers that read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.quantizer import Quantizer


def rounded_once(x: Tensor, readers: Sequence[nn.Module]) -> Tensor:
    """Rounds what several quantizers read, if they have one grid: the same values and gradients.

    The readers then let it pass. Where they differ they are left to round by themselves.

    Args:
        x: What the readers are about to read.
        readers: Quantizers; with less than two there is nothing to share.

    Returns:
        ``x``, rounded if that serves all.
    """
    return readers[0](x) if len(readers) > 1 and _alike(readers) else x


def rectified(x: Tensor, relu: nn.Module, readers: Sequence[Any]) -> Tensor:
    """``relu(x)`` and, in training, the rounding of those that read it in the same pass.

    Args:
        x: Input of the activation.
        relu: The activation; called where the two cannot be joined.
        readers: All that read its output; quantizers if the two are to be joined.

    Returns:
        ``relu(x)``, rounded if that serves all.
    """
    if torch.is_grad_enabled() and type(relu) is nn.ReLU and _alike(readers):
        return readers[0].rectified(x)
    return relu(x)


def _alike(readers: Sequence[Any]) -> bool:
    if not readers or not all(isinstance(q, Quantizer) for q in readers):
        return False
    grid = readers[0].grid
    return grid is not None and all(q.grid == grid for q in readers)
