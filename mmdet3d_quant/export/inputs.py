"""Random inputs of the files, drawn as what their names say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Depth maps: share of the pixels that the LiDAR hits, and metres to the farthest.
HIT, FARTHEST = 0.02, 60
#: Inputs that come out of a ReLU.
RECTIFIED = ('bev', 'camera', 'feat_in', 'lidar', 'middle')


def random_input(name: str, shape: Sequence[int], rng: torch.Generator) -> Tensor:
    """Draws an input of an exported file.

    Args:
        name: Its name in the file.
        shape: Its shape.
        rng: Generator on the CPU.

    Returns:
        float32 of that shape: metres evenly up to :data:`FARTHEST` at some pixels, else 0, for
        ``depth``; normally distributed and rectified for maps; normally distributed for others.
    """
    shape = tuple(shape)
    if name == 'depth':
        metres = torch.rand(shape, generator=rng) * FARTHEST
        return metres * (torch.rand(shape, generator=rng) < HIT)
    drawn = torch.randn(shape, generator=rng)
    return drawn.relu() if name in RECTIFIED else drawn
