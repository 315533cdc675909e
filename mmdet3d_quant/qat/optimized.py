"""Checks of the optimizer of a training with quantizers: what it trains, and what it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn
from torch.optim import Optimizer

from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.files.errors import CheckpointError

_HOW = 'optim_wrapper.paramwise_cfg=dict(custom_keys={...})'


def optimizer_of_ranges(model: nn.Module, runner: Runner) -> Optimizer:
    """Finds the optimizer that trains all learned ranges; warns where its settings ruin them.

    Args:
        model: A model with learned ranges.
        runner: Its optimizers are built.

    Raises:
        ValueError: If an optimizer leaves out a learned range, or several share them.
    """
    learned = {
        f'{name}._amax': quantizer._amax
        for name, quantizer in quantizers(model).items()
        if quantizer.learned and quantizer._amax.requires_grad
    }
    rests = []
    for optimizer in _optimizers(runner.optim_wrapper):
        groups = {id(p): group for group in optimizer.param_groups for p in group['params']}
        rest = [name for name, amax in learned.items() if id(amax) not in groups]
        if not rest:
            by_name = {name: groups[id(amax)] for name, amax in learned.items()}
            _warn_of_settings(by_name, runner)
            return optimizer
        rests.append(rest)
    rest = min(rests, key=len)
    if len(rests) > 1:
        raise ValueError(
            f'QATHook: no optimizer trains all learned ranges, the best one not {rest[0]}: give '
            'them to one optimizer, or train with fixed ranges (learn_amax=False)'
        )
    raise ValueError(f'QATHook: the optimizer does not train {rest[0]}')


def _optimizers(wrapper: Any) -> list[Optimizer]:
    several = isinstance(wrapper, OptimWrapperDict)
    return [w.optimizer for w in (wrapper.values() if several else [wrapper])]


def _warn_of_settings(groups: Mapping[str, Mapping[str, Any]], runner: Runner) -> None:
    """Warns if weight decay shrinks ranges, or if their learning rates differ."""
    if any(group.get('weight_decay') for group in groups.values()):
        runner.logger.warning(
            'QATHook: weight decay pulls the learned ranges towards 0; switch it off with '
            + _HOW.replace('...', "'_amax': dict(decay_mult=0)")
        )
    rates = {name: group.get('initial_lr', group['lr']) for name, group in groups.items()}
    least, most = (pick(rates, key=lambda name: rates[name]) for pick in (min, max))
    if rates[least] != rates[most]:
        runner.logger.warning(
            f'QATHook: learned ranges have different learning rates: {rates[least]:g} for {least}, '
            f'{rates[most]:g} for {most}. Of custom_keys only the longest that is part of a name '
            "counts: '_quantizer._amax' is longer than 'img_backbone', '_amax' is not"
        )


def check_resumed(checkpoint: Mapping[str, Any], runner: Runner) -> None:
    """Checks that the optimizer's state in a checkpoint is one of this run's parameters.

    Raises:
        CheckpointError: If it has other groups, as after a training without learned ranges.
    """
    saved = (checkpoint.get('optimizer') or {}).get('param_groups')
    wrapper = runner.optim_wrapper
    if saved is None or not isinstance(wrapper, OptimWrapper):  # several, or not built yet
        return
    sizes = [[len(g['params']) for g in groups] for groups in (saved, wrapper.param_groups)]
    if sizes[0] != sizes[1]:
        found, wanted = (f'{sum(s)} parameters in {len(s)} group(s)' for s in sizes)
        raise CheckpointError(
            f"the checkpoint to resume has an optimizer's state of {found}, this run trains "
            f'{wanted}: resuming needs the model, learn_amax included, and the optim_wrapper of '
            'the run that saved it. To start a new run from its weights, set load_from to it '
            'without resume (after tools/calibrate.py, if it has no ranges)'
        )
