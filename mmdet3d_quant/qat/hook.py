"""mmengine hook for quantization-aware training."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner, autocast
from torch import nn

from mmdet3d_quant.core.coverage import coverage, float_parts
from mmdet3d_quant.core.modes import kept_float, quantizers, require_calibrated, set_mode
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.core.spec import select
from mmdet3d_quant.core.ties import share_ranges, unequal_ties
from mmdet3d_quant.improve.recorded import MOVES
from mmdet3d_quant.qat.averaging import averaging, fit_checkpoint, fit_model
from mmdet3d_quant.qat.clipping import Clipping
from mmdet3d_quant.qat.moving import LearnedRanges, WeightRanges, require_ranges
from mmdet3d_quant.qat.optimized import check_resumed, optimizer_of_ranges
from mmdet3d_quant.qat.schedule import read_schedule, read_time

#: Key of the hook's state in a checkpoint.
KEY = 'qat'
#: Iterations from one look at what ranges clip to the next; there is one at the end of an epoch.
CLIPPING_EVERY = 200
#: What checkpoints go on telling in their ``meta``: the notes of calibration.
_KEPT = ('kept_float', 'macs', 'unsigned_ranges', *MOVES)


@HOOKS.register_module()
class QATHook(Hook):
    """Trains a calibrated model with quantization in its forward pass.

    Before the first step it checks that every quantizer has a range and that tied ones have
    equal ones. While training, ranges of weights follow the weights, learned ranges (models with
    ``learn_amax=True``) stay tied, and batch norm uses its running statistics, as the deployed
    model does.

    Validation and test run the quantized model, whatever the stage of the schedule. With
    mmengine's ``EMAHook``, before or after this hook, they run the averaged weights with ranges
    of their own, and so do checkpoints have them. Where fixed ranges of activations clip more than
    they should, a warning names them.

    Every step seeds torch from the run's seed, its rank and its number, so that a resumed run
    draws the dropout of an uninterrupted one.

    Times are in epochs, or in iterations with an ``IterBasedTrainLoop``.

    Args:
        freeze_bn: Time from which batch norm keeps its statistics; None: never. Its weight and
            bias go on being trained.
        schedule: Modes by time and name pattern, for example
            ``{0: {'img_*': 'float'}, 2: {'*': 'quant'}}``; what no pattern names is quantized.
            They end with the training.
            With several processes, learned ranges and ``'float'``, DDP needs
            ``find_unused_parameters=True``.
        validate_float: Also validate the same weights without quantization; its metrics carry
            the prefix ``float/``.

    Raises:
        ValueError: If ``freeze_bn`` or the schedule is malformed.
    """

    priority = 'NORMAL'

    def __init__(
        self,
        freeze_bn: int | None = 0,
        schedule: Mapping[int, Mapping[str, str]] | None = None,
        validate_float: bool = False,
    ) -> None:
        self.freeze_bn = None if freeze_bn is None else read_time(freeze_bn, 'freeze_bn')
        self.schedule = read_schedule(schedule)
        self.validate_float = validate_float
        self._stage: dict[str, str] | None = None
        self._float: list[Quantizer] = []  # by the stage
        self._evaluating = False
        self._saved: dict[str, Any] = {}
        self._meta: dict[str, Any] = {}
        self._weights: WeightRanges | None = None
        self._learned: LearnedRanges | None = None
        self._clipping: Clipping | None = None

    def before_train(self, runner: Runner) -> None:
        """Checks the model and attaches to the optimizer.

        Raises:
            UncalibratedError: If a quantizer has no range.
            ValueError: If the model has no quantizers, ranges of a tie group differ, a pattern
                of the schedule matches nothing, the optimizer leaves out learned ranges, or
                there is another QATHook.
        """
        model = bare_model(runner)
        for former in (self._learned, self._clipping):  # of a training that was cut off
            if former is not None:
                former.stop()
        if sum(isinstance(hook, QATHook) for hook in runner.hooks) > 1:
            raise ValueError('QATHook: the config has several QATHooks; leave one')
        if not quantizers(model):
            raise ValueError('QATHook: the model has no quantizers; use Quant* types in the config')
        for modes in self.schedule.values():
            for pattern in modes:
                if not select(quantizers(model), pattern):
                    raise ValueError(f'QATHook: schedule pattern {pattern!r} matches no quantizer')
        require_calibrated(model, self._meta.get('kept_float'))
        broken = unequal_ties(model)
        if broken:
            raise ValueError(
                f'QATHook: {" and ".join(broken[0][:2])} must share one range and have different '
                'ones: calibrate the whole model with tools/calibrate.py'
            )
        self._stage, self._evaluating = None, False
        self._weights = WeightRanges(model, self._saved.get('weight_ratios'))
        # Compiled code takes no hooks.
        self._clipping = None if runner.cfg.get('compile') else Clipping(model)
        self._learned = LearnedRanges(model)
        if len(self._learned):
            self._learned.attach(optimizer_of_ranges(model, runner))
        share_ranges(model)
        if getattr(runner.train_dataloader, 'persistent_workers', False):
            runner.logger.info(
                'QATHook: workers of the train_dataloader live on between epochs '
                '(persistent_workers=True), so a resumed run draws other augmentations'
            )
        runner.logger.info(
            f'QATHook: {len(quantizers(model))} quantizers, ranges of {len(self._learned)} groups '
            'learned'
        )
        found = coverage(model, self._meta.get('macs'))
        runner.logger.info('\n'.join([f'QATHook: {found.summary()}', *found.lines()]))
        for warning in float_parts(model, found):
            runner.logger.warning(f'QATHook: {warning}')

    def before_train_epoch(self, runner: Runner) -> None:
        """Seeds random, numpy and torch for data that this process loads."""
        seed = _seed(runner)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Sets the schedule's modes, freezes batch norm, and seeds torch."""
        model = bare_model(runner)
        self._end_evaluation(runner)  # one that an error cut off
        now = runner.iter if isinstance(runner.train_loop, IterBasedTrainLoop) else runner.epoch
        self._set_modes(model, now)
        if self.freeze_bn is not None and now >= self.freeze_bn:
            for module in model.modules():
                if 'running_mean' in module._buffers:  # mmcv's SyncBatchNorm is none of torch's
                    module.eval()
        if self._clipping and (runner.iter % CLIPPING_EVERY == 0 or self._last(runner, batch_idx)):
            self._clipping.start()
        torch.manual_seed(_seed(runner))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Recomputes weight ranges from the weights (a no-op between accumulation steps).

        Raises:
            RuntimeError: If learned ranges were trained without the optimizer's step hooks.
        """
        assert self._weights is not None and self._learned is not None
        self._weights.follow()
        self._learned.check()
        clipped = self._clipping and self._clipping.message()
        if clipped:
            runner.logger.warning(f'QATHook: in iteration {runner.iter + 1} {clipped}')

    def after_train(self, runner: Runner) -> None:
        """Ends the last stage of the schedule: what it left float is quantized."""
        for quantizer in self._float:
            quantizer.mode = 'quant'
        self._float = []

    def _last(self, runner: Runner, batch_idx: int) -> bool:
        """Tells whether an epoch ends with this step."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):  # its data may have no length
            return self.is_last_train_iter(runner)
        return self.end_of_epoch(runner.train_dataloader, batch_idx)

    def _set_modes(self, model: nn.Module, now: int) -> None:
        """Applies the last stage of the schedule that has begun, if it is a new one."""
        past = [time for time in self.schedule if time <= now]
        stage = self.schedule[max(past)] if past else {}
        if stage != self._stage:
            self._set_stage(model, stage)

    def _set_stage(self, model: nn.Module, stage: dict[str, str]) -> None:
        """Applies a stage, and notes what it leaves float."""
        self._stage = stage
        by_name = quantizers(model)
        set_mode(model, 'quant')
        for pattern, mode in stage.items():
            for name in select(by_name, pattern):
                by_name[name].mode = mode
        active = [q for q in by_name.values() if q.float_reason is None]
        self._float = [q for q in active if q.mode == 'float']

    def before_val_epoch(self, runner: Runner) -> None:
        """Validates without quantization if asked and if averaged weights are in by now."""
        if self.validate_float and averaging(runner, before=self):
            self._validate_float(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        """Validates without quantization if asked and not done before."""
        if self.validate_float and not averaging(runner, before=self):
            self._validate_float(runner)

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Begins an evaluation, once all hooks have made the weights what is evaluated."""
        if not self._evaluating:
            self._evaluating = True
            for quantizer in self._float:
                quantizer.mode = 'quant'
            self._fit_ranges(runner)

    def after_val(self, runner: Runner) -> None:
        """Ends an evaluation, once all hooks have put the weights back."""
        self._end_evaluation(runner)

    before_test_iter = before_val_iter
    before_val = before_test = after_test = after_val  # before: one that an error cut off

    def _end_evaluation(self, runner: Runner) -> None:
        if self._evaluating:
            self._evaluating = False
            for quantizer in self._float:
                quantizer.mode = 'float'
            self._fit_ranges(runner)

    def _fit_ranges(self, runner: Runner) -> None:
        """Gives the weights, which averaging may have swapped, their own ranges."""
        if averaging(runner):
            ratios = self._saved.get('weight_ratios')
            if self._weights is None and ratios:  # an evaluation without training
                self._weights = WeightRanges(bare_model(runner), ratios)
            fit_model(bare_model(runner), self._weights)

    def _validate_float(self, runner: Runner) -> None:
        loop = runner.val_loop
        runner.model.eval()
        with set_mode(bare_model(runner), 'float'), torch.no_grad(), autocast(enabled=loop.fp16):
            for batch in loop.dataloader:
                outputs = runner.model.val_step(batch)
                loop.evaluator.process(data_samples=outputs, data_batch=batch)
        for name, value in loop.evaluator.evaluate(len(loop.dataloader.dataset)).items():
            if isinstance(value, (int, float)):
                runner.message_hub.update_scalar(f'val/float/{name}', value)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Gives all weights in it their own ranges; stores their ratios and what stays float.

        Raises:
            RuntimeError: If ranges were lost in training.
        """
        if self._weights is not None:
            fit_checkpoint(checkpoint, self._weights, runner)
            require_ranges(checkpoint['state_dict'], self._learned)
            checkpoint[KEY] = dict(weight_ratios=self._weights.ratios)
        meta = checkpoint.setdefault('meta', {})
        meta.update(self._meta, kept_float=kept_float(bare_model(runner)))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Reads the state that a former run stored.

        Raises:
            CheckpointError: If a run is resumed with other parameters.
        """
        if runner._resume:
            check_resumed(checkpoint, runner)
        self._saved = checkpoint.get(KEY) or {}
        meta = checkpoint.get('meta') or {}
        self._meta = {key: meta[key] for key in _KEPT if key in meta}


def bare_model(runner: Runner) -> nn.Module:
    """Unwraps the runner's model from DDP or another wrapper of mmengine."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _seed(runner: Runner) -> int:
    """Computes a seed that differs by run, step and process."""
    step = (runner.seed or 0) * 1_000_003 + runner.iter
    return (step * get_world_size() + get_rank()) % 2**63
