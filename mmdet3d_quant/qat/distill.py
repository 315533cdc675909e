"""Distillation of the float model into the quantized one while it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.modes import set_mode
from mmdet3d_quant.improve.moves import apply
from mmdet3d_quant.improve.recorded import MOVED, recorded_moves
from mmdet3d_quant.qat.hook import bare_model
from mmdet3d_quant.runs import from_config as fc


@HOOKS.register_module()
class DistillHook(Hook):
    """Adds losses for the distance of a detector's features from those of the float model.

    The teacher is built from the run's own config, with the weights of ``checkpoint``, in float
    and evaluation mode; it is no part of the trained model, nor of its checkpoints. Factors that
    steps of the calibration moved in the model are moved in a float checkpoint's, too. It sees the
    same batch, augmentation included. Each named module adds ``loss_distill_NAME``: the mean over
    samples of ``||student - teacher||^2 / ||teacher||^2``, which is the reciprocal of the SQNR.

    Args:
        checkpoint: Weights of the teacher: the float checkpoint, or the calibrated one, if no step
            of its calibration moved the float model.
        modules: Weight of the loss by name of the module whose output is compared, for example
            ``{'pts_neck': 1.0, 'bbox_head.heatmap_head': 1.0}``. Outputs that depend on which
            objects a model found (boxes by query) cannot be compared.

    Raises:
        ValueError: If there is no module or a weight is not positive.
    """

    # After QATHook, whose errors about the model come first.
    priority = 'BELOW_NORMAL'

    def __init__(self, checkpoint: str, modules: Mapping[str, float]) -> None:
        if not modules or min(modules.values()) <= 0:
            raise ValueError(f'DistillHook: expected module names with weights > 0, got {modules}')
        self.checkpoint = checkpoint
        self.modules = dict(modules)
        self.teacher: nn.Module
        self._seen: dict[str, Any] = {}
        self._handles: list[Any] = []
        self._meta: dict[str, Any] = {}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keeps the notes of the checkpoint that training begins with."""
        self._meta = checkpoint.get('meta') or {}

    def before_train(self, runner: Runner) -> None:
        """Builds the teacher and registers forward hooks on both models.

        Raises:
            CheckpointError: If the checkpoint does not fit the config.
            QuantError: If factors were moved in it that were not moved in the model.
            ValueError: If the model has no module of a name.
        """
        model = bare_model(runner)
        known = dict(model.named_modules())
        for name in self.modules:
            if name not in known:
                parent = known.get(name.rpartition('.')[0], model)
                some = ', '.join(child for child, _ in parent.named_children())
                raise ValueError(f'DistillHook: the model has no module {name!r}; there are {some}')
        self.teacher = fc.build_model(runner.cfg)
        meta = fc.load_weights(self.teacher, self.checkpoint, calibrated=False)
        self._fit(meta, runner)
        self.teacher.to(next(model.parameters()).device).eval().requires_grad_(False)
        set_mode(self.teacher, 'float')
        for handle in self._handles:  # of a training that was cut off
            handle.remove()
        self._seen.clear()
        self._handles = [
            dict(of.named_modules())[name].register_forward_hook(self._listener(f'{role} {name}'))
            for role, of in (('student', model), ('teacher', self.teacher))
            for name in self.modules
        ]
        self._handles.append(model.register_forward_hook(self._add_losses, with_kwargs=True))

    def _fit(self, meta: Mapping[str, Any], runner: Runner) -> None:
        """Moves the factors of the student in the teacher; warns if that is no float model."""
        own, moves = (recorded_moves(notes, self.teacher) for notes in (meta, self._meta))
        if own and own != moves:
            raise QuantError(
                f'DistillHook: factors were moved in {self.checkpoint} that were not in the model '
                'that is trained: name the float checkpoint'
            )
        try:
            apply(self.teacher, [] if own else moves)
        except RuntimeError as err:
            raise QuantError(
                'DistillHook: factors in the notes of the checkpoint that is trained do not fit '
                f'the model: {err}'
            ) from err
        changed = [key for key in MOVED if meta.get(key)]
        if changed:
            runner.logger.warning(
                f'DistillHook: {self.checkpoint} is not the float model, steps of its calibration '
                f'changed it ({", ".join(changed)}): name the float checkpoint as the teacher'
            )

    def _listener(self, key: str) -> Any:
        def listen(module: nn.Module, inputs: Any, output: Any) -> None:
            self._seen[key] = output

        return listen

    def _add_losses(self, model: nn.Module, args: tuple, kwargs: dict, losses: Any) -> Any:
        if kwargs.get('mode') != 'loss':
            self._seen.clear()
            return losses
        with torch.no_grad():
            self.teacher(*args, **kwargs)
        extra = {}
        for name, weight in self.modules.items():
            missing = [r for r in ('student', 'teacher') if f'{r} {name}' not in self._seen]
            if missing:
                raise ValueError(f'DistillHook: the {missing[0]} does not run {name!r} in training')
            student, teacher = (self._seen[f'{role} {name}'] for role in ('student', 'teacher'))
            extra[f'loss_distill_{name.replace(".", "_")}'] = weight * distance(student, teacher)
        self._seen.clear()
        return {**losses, **extra}


def distance(student: Any, teacher: Any) -> Tensor:
    """Computes the mean over samples of ``||student - teacher||^2 / ||teacher||^2``.

    Args:
        student: A tensor (B, ...), or any nesting of lists, tuples and dicts of such.
        teacher: The same.

    Returns:
        Scalar, float32; the mean over the tensors.

    Raises:
        ValueError: If there are no floating tensors, or shapes differ.
    """
    pairs = list(strict_zip(_tensors(student), _tensors(teacher)))
    if not pairs or any(s.shape != t.shape for s, t in pairs):
        shapes = [(tuple(s.shape), tuple(t.shape)) for s, t in pairs]
        raise ValueError(f'distillation compares floating tensors of equal shapes, got {shapes}')
    errors = []
    for s, t in pairs:
        s, t = s.float().flatten(1), t.detach().float().flatten(1)
        size = t.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        errors.append(((s - t).square().sum(1) / size).mean())
    return torch.stack(errors).mean()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
