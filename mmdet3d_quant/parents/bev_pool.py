"""Sum of camera features over bird's-eye-view cells, without the depth x context product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bev_pool(context: Tensor, depth: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """Adds every pixel's context, weighted by its depth distribution, to the cells it hits.

    Row ``k`` of the result is the sum of ``depth[m, d, h, w] * context[m, :, h, w]`` over all
    ``(m, d, h, w)`` with ``cells[m, d, h, w] == k``. The products are never stored: a cell is a
    bag of pixels with one weight per member. Points are summed in their own order, so the
    result does not vary from run to run on a CPU. Differentiable in ``context`` and ``depth``.

    Args:
        context: Features of M feature maps, (M, C, H, W), floating point.
        depth: Weight of each depth bin of each pixel, (M, D, H, W), floating point.
        cells: Cell of each depth bin of each pixel, (M, D, H, W), int64. Entries outside
            ``[0, num_cells)`` are dropped.
        num_cells: Number of rows of the result.

    Returns:
        (num_cells, C) in float32 (float64 if an input is float64); empty cells are 0.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    maps, _, height, width = context.shape
    expected = (maps, depth.shape[1], height, width)
    if depth.shape != expected or cells.shape != expected:
        raise ValueError(
            'bev_pool expects context (M, C, H, W) and depth and cells (M, D, H, W), got '
            f'{tuple(context.shape)}, {tuple(depth.shape)} and {tuple(cells.shape)}'
        )
    dtype = torch.promote_types(torch.promote_types(context.dtype, depth.dtype), torch.float32)

    flat = cells.flatten()
    points = ((flat >= 0) & (flat < num_cells)).nonzero().squeeze(1)
    by_cell, order = flat[points].sort(stable=True)
    points = points[order]
    starts = torch.searchsorted(by_cell, torch.arange(num_cells, device=flat.device))

    # Point (m, d, h, w) reads the context of pixel (m, h, w).
    area = height * width
    pixels = points // (depth[0].numel()) * area + points % area
    table = context.to(dtype).permute(0, 2, 3, 1).flatten(0, 2)
    weights = depth.to(dtype).flatten()[points]
    return F.embedding_bag(pixels, table, starts, mode='sum', per_sample_weights=weights)
