"""Histograms against numpy, in any order and split."""

import numpy as np
import pytest
import torch

from mmdet3d_quant.histogram import NUM_BINS, Histogram, NonFiniteError


def collected(*tensors):
    h = Histogram()
    for t in tensors:
        h.collect(t)
    return h


def test_counts_equal_numpy():
    x = torch.randn(3, 1000) * 5
    h = collected(x)
    limit = 2.0**h.exponent
    assert limit / 2 <= float(x.abs().max()) < limit
    expected, _ = np.histogram(x.abs().numpy(), bins=NUM_BINS, range=(0, limit))
    assert np.array_equal(h.counts.numpy(), expected)
    assert h.num_elements == 3000 and h.amax == float(x.abs().max())


def test_order_and_split_do_not_matter():
    torch.manual_seed(0)
    parts = [torch.randn(500) * s for s in (0.01, 100.0, 1.0, 0.0, 7.0)]
    parts.append(torch.tensor([64.0, 128.0, 2.0**-3]))  # powers of two sit on bin edges
    forward, backward = collected(*parts), collected(*reversed(parts))
    merged = Histogram()
    for part in parts:
        merged.merge(collected(part))
    whole = collected(torch.cat(parts))
    for h in (backward, merged, whole):
        assert torch.equal(h.counts, forward.counts)
        assert (h.exponent, h.amax, h.num_elements) == (
            forward.exponent,
            forward.amax,
            forward.num_elements,
        )
    assert int(forward.counts.sum()) == forward.num_elements


def test_counts_beyond_float32_precision_are_exact():
    h = collected(torch.zeros(2**24 + 3), torch.ones(5))
    assert h.counts[0] == 2**24 + 3 and int(h.counts.sum()) == 2**24 + 8


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_non_finite_values_stop_and_add_nothing(bad):
    h = Histogram('layer9')
    with pytest.raises(NonFiniteError, match='layer9.*1 of 3'):
        h.collect(torch.tensor([1.0, bad, 2.0]))
    assert h.num_batches == 0 and h.compute_amax('max') is None


def test_all_zero_tensor_has_range_zero():
    for method in ('max', 'mse', 'entropy', 'percentile'):
        assert collected(torch.zeros(10)).compute_amax(method) == 0
