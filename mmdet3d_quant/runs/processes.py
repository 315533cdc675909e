"""Several processes for one job, with a GPU each or on CPUs."""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import patch

import torch
from mmengine.dist import init_dist

from mmdet3d_quant.runs.from_config import ConfigError

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


def join(launcher: str) -> None:
    """Joins the processes that a launcher started: nccl with GPUs, else gloo.

    Args:
        launcher: One of :data:`LAUNCHERS`.

    Raises:
        ConfigError: If the launcher did not start this process.
    """
    if launcher == 'none':
        return
    gpu = torch.cuda.is_available()
    with ExitStack() as stack:
        if not gpu:  # mmengine sets the device without asking whether there is one
            stack.enter_context(patch('torch.cuda.set_device'))
        try:
            init_dist(launcher, backend='nccl' if gpu else 'gloo')
        except KeyError as err:
            raise ConfigError(
                f'--launcher {launcher}: {err} is not in the environment; was this started by it?'
            ) from None


def own_device(name: str | None) -> str | None:
    """Returns ``name``, or if None the GPU that :func:`join` gave this process, if it did."""
    shared = name is None and torch.cuda.is_available() and torch.distributed.is_initialized()
    return f'cuda:{torch.cuda.current_device()}' if shared else name
