"""Rounding a tensor once, where it arises, for all quantizers that read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.core.fake_quant import compiling
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.layers.base import QuantLayer


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
        readers: All that read its output. Only if they are quantizers are the two joined.

    Returns:
        ``relu(x)``, rounded if that serves all.
    """
    if torch.is_grad_enabled() and type(relu) is nn.ReLU and untouched(relu) and _alike(readers):
        return readers[0].rectified(x)
    return relu(x)


def untouched(module: nn.Module) -> bool:
    """Whether nobody listens to a module or has put in another forward, as checkpointing does.

    Who listens shall hear the same in training and evaluation; and a reentrant checkpoint computes
    anew from copies of its inputs, which do not tell that they are rounded.
    """
    if compiling():  # where nothing is joined
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and 'forward' not in module.__dict__


def input_quantizer(layer: nn.Module) -> list[nn.Module]:
    """The quantizer that reads the input of a layer, in a list; none if that is not certain."""
    return [layer._input_quantizer] if isinstance(layer, QuantLayer) and untouched(layer) else []


def _alike(readers: Sequence[Any]) -> bool:
    if not readers or not all(isinstance(q, Quantizer) for q in readers):
        return False
    grid = readers[0].grid
    return grid is not None and all(q.grid == grid for q in readers[1:])
