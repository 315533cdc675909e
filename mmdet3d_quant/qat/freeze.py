"""Parts of a detector that stay as they are while the others are trained."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmdet3d_quant.qat.hook import bare_model


@HOOKS.register_module()
class FreezeHook(Hook):
    """Keeps modules of a detector as they are: weights, and the statistics of batch norms.

    No gradient is computed for a frozen module that comes first, which saves the time, too.

    Args:
        modules: Names of modules, for example ``['pts_middle_encoder']``.

    Raises:
        ValueError: If there is no name.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        if isinstance(modules, str) or not modules:
            raise ValueError(f'FreezeHook: expected a list of module names, got {modules!r}')
        self.modules = tuple(modules)

    def before_train(self, runner: Runner) -> None:
        """Finds the modules and takes their parameters out of the training.

        Raises:
            ValueError: If the model has no module of a name.
        """
        known = dict(bare_model(runner).named_modules())
        for name in self.modules:
            if name not in known:
                raise ValueError(f'FreezeHook: the model has no module {name!r}')
            known[name].requires_grad_(False)
        self._frozen = [known[name] for name in self.modules]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Puts the modules in evaluation mode: a loop's epoch begins with all in training mode."""
        for module in self._frozen:
            module.eval()
