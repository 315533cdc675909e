"""Pooling against a loop-free but wasteful reference: the outer product and index_add."""

import pytest
import torch

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.parents import bev_pool

MAPS, CHANNELS, BINS, HEIGHT, WIDTH, CELLS = 3, 5, 7, 4, 6, 20


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    context = torch.randn(MAPS, CHANNELS, HEIGHT, WIDTH, dtype=dtype, requires_grad=True)
    depth = torch.rand(MAPS, BINS, HEIGHT, WIDTH, dtype=dtype, requires_grad=True)
    # Cells 0, 7 and the last stay empty; some points fall outside on either side.
    cells = torch.randint(-3, CELLS + 3, (MAPS, BINS, HEIGHT, WIDTH))
    cells[(cells == 0) | (cells == 7) | (cells == CELLS - 1)] = -1
    return context, depth, cells


def reference(context, depth, cells, num_cells):
    points = depth[:, :, None] * context[:, None]
    points = points.permute(0, 1, 3, 4, 2).reshape(-1, context.shape[1])
    kept = ((cells >= 0) & (cells < num_cells)).flatten()
    out = torch.zeros(num_cells, context.shape[1], dtype=points.dtype)
    return out.index_add(0, cells.flatten()[kept], points[kept])


def test_sums_what_the_outer_product_sums():
    context, depth, cells = inputs()
    out = bev_pool(context, depth, cells, CELLS)
    torch.testing.assert_close(out, reference(context, depth, cells, CELLS))
    assert out[[0, 7, CELLS - 1]].eq(0).all() and out[1].ne(0).all()


def test_gradients_of_both_inputs():
    context, depth, cells = inputs()
    weight = torch.randn(CELLS, CHANNELS)
    ours = torch.autograd.grad(
        (bev_pool(context, depth, cells, CELLS) * weight).sum(), (context, depth)
    )
    wanted = torch.autograd.grad(
        (reference(context, depth, cells, CELLS) * weight).sum(), (context, depth)
    )
    for a, b in strict_zip(ours, wanted):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b)


def test_gradients_numerically():
    context, depth, cells = inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda c, d: bev_pool(c, d, cells[:1], CELLS),
        (context[:1].detach().requires_grad_(), depth[:1].detach().requires_grad_()),
    )


def test_half_precision_is_summed_in_float32():
    context, depth, cells = (t.detach() for t in inputs())
    half = bev_pool(context.half(), depth.half(), cells, CELLS)
    assert half.dtype == torch.float32
    wanted = reference(context.half().float(), depth.half().float(), cells, CELLS)
    torch.testing.assert_close(half, wanted)


def test_is_deterministic():
    context, depth, cells = inputs()
    first = bev_pool(context, depth, cells, CELLS)
    assert all(torch.equal(first, bev_pool(context, depth, cells, CELLS)) for _ in range(5))


def test_no_point_inside():
    context, depth, cells = inputs()
    out = bev_pool(context, depth, torch.full_like(cells, -1), CELLS)
    assert out.shape == (CELLS, CHANNELS) and out.eq(0).all()
    out.sum().backward()
    assert context.grad.eq(0).all() and depth.grad.eq(0).all()


def test_shapes_are_checked():
    context, depth, cells = inputs()
    with pytest.raises(ValueError, match='bev_pool expects'):
        bev_pool(context, depth, cells[:, 1:], CELLS)
