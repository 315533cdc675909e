"""Ranges of weights that mmengine's ``EMAHook`` averages and swaps."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import nn

from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.qat.moving import WeightRanges


def averaging(runner: Runner, before: Hook | None = None) -> list[EMAHook]:
    """Finds the hooks that average weights.

    Args:
        runner: Has the hooks.
        before: Only those that are called before this one.
    """
    hooks = list(runner.hooks)
    end = len(hooks) if before is None else hooks.index(before)
    return [hook for hook in hooks[:end] if isinstance(hook, EMAHook)]


@torch.no_grad()
def fit_model(model: nn.Module, weights: WeightRanges | None) -> None:
    """Gives the weights of a model, which were swapped, their own ranges.

    Args:
        model: The trained model.
        weights: Its ranges, if they are known to follow the weights.
    """
    for quantizer in quantizers(model).values():
        if quantizer._amax is not None:
            quantizer._amax.mul_(1)  # swapping leaves the version, which `core.joined` goes by
    if weights is not None:
        weights.follow()


@torch.no_grad()
def fit_checkpoint(checkpoint: dict[str, Any], weights: WeightRanges, runner: Runner) -> None:
    """Gives all weights in a checkpoint their own ranges.

    Args:
        checkpoint: What is about to be saved. Changed in place; its tensors are not.
        weights: The ranges of the trained model.
        runner: Its hooks may be about to add averaged weights, whose ranges are set in their model.
    """
    for key, prefix in (('state_dict', ''), ('ema_state_dict', 'module.')):
        if key in checkpoint:
            checkpoint[key].update(weights.of(checkpoint[key], prefix))
    for hook in averaging(runner):
        state = hook.ema_model.module.state_dict()
        for name, value in weights.of(state).items():
            state[name].copy_(value)
