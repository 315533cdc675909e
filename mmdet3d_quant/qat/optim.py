"""Mixed precision that needs neither a GPU nor a loss scale."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Runs the forward in bfloat16 where that is safe; takes the arguments of ``OptimWrapper``.

    mmengine's ``AmpOptimWrapper`` insists on a GPU. bfloat16 has float32's range, so that losses
    need no scaling, and CPUs with AVX-512 BF16 or AMX compute in it.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of a training step."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield
