"""Histograms against numpy, in any order and split."""

import copy

import numpy as np
import pytest
import torch

from mmdet3d_quant.calibration.counting import count_by_histc
from mmdet3d_quant.calibration.histogram import (
    NUM_BINS,
    Histogram,
    NonFiniteError,
    _merge_stacked,
)
from mmdet3d_quant.core.compat import strict_zip


def collected(*tensors):
    h = Histogram()
    for t in tensors:
        h.collect(t)
    return h


def test_counts_equal_numpy():
    x = torch.randn(3, 1000) * 5
    h = collected(x)
    limit = 2.0 ** int(h.exponent)
    assert limit / 2 <= float(x.abs().max()) < limit
    expected, _ = np.histogram(x.abs().numpy(), bins=NUM_BINS, range=(0, limit))
    assert np.array_equal(h.view()[0], expected)
    assert h.num_elements == 3000 and h.amax == float(x.abs().max())


@pytest.mark.parametrize('octaves', [0, 1, 3, 6, 15])
@pytest.mark.parametrize('scale', [1e-6, 1.0, 1e30])
def test_views_equal_numpy(octaves, scale):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(5000), torch.randn(5000) * 1e-3, torch.tensor([900.0])]) * scale
    h = collected(x)
    counts, width = h.view(octaves)
    values = x.abs().double().numpy()
    inside = values < width * NUM_BINS
    expected, _ = np.histogram(values[inside], bins=NUM_BINS, range=(0, width * NUM_BINS))
    assert np.array_equal(counts, expected)
    count, total, squares = h.beyond(octaves)
    assert count == (~inside).sum()
    assert total == pytest.approx(values[~inside].sum(), rel=1e-3)
    assert squares == pytest.approx((values[~inside] ** 2).sum(), rel=1e-3)


def test_bins_hold_the_values_between_their_ends():
    x = torch.logspace(-12, 3, 3000)
    h = collected(x)
    ends = h.centers() + h.widths() / 2
    index = np.searchsorted(ends, x.double().numpy(), side='right')
    assert np.array_equal(np.bincount(index, minlength=len(ends)), h.bins.numpy())


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
        assert torch.equal(h.bins, forward.bins)
        assert (h.exponent, h.amax, h.num_elements) == (
            forward.exponent,
            forward.amax,
            forward.num_elements,
        )
    assert int(forward.bins.sum()) == forward.num_elements


@pytest.mark.parametrize('scale', [2.0**-30, 1e-5, 0.02, 3.0])
def test_a_tensor_of_zeros_costs_no_resolution(scale):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * scale
    alone = collected(x)
    for h in (collected(torch.zeros(500), x), collected(x, torch.zeros(500))):
        assert h.exponent == alone.exponent
        counts, width = h.view()
        expected, _ = np.histogram(np.r_[x.abs(), np.zeros(500)], NUM_BINS, (0, width * NUM_BINS))
        assert np.array_equal(counts, expected) and width == alone.view()[1]


def test_counts_beyond_float32_precision_are_exact():
    h = collected(torch.zeros(2**24 + 3), torch.ones(5))
    assert h.bins[0] == 2**24 + 3 and int(h.bins.sum()) == 2**24 + 8


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), float('-inf')])
def test_non_finite_values_stop_and_add_nothing(bad):
    h = collected(torch.ones(3))
    h.name = 'layer9'
    with pytest.raises(NonFiniteError, match='layer9 is the first'):
        h.collect(torch.tensor([1.0, bad, 2.0]))
    assert h.num_tensors == 1 and int(h.bins.sum()) == 3 and h.finite


def test_zeros_are_counted_at_any_range():
    h = collected(torch.zeros(10))
    assert h.amax == 0 and int(h.bins[0]) == 10
    h.collect(torch.full((5,), 100.0))
    assert h.amax == 100 and int(h.bins[0]) == 10 and int(h.bins.sum()) == 15
    assert collected(torch.zeros(0)).num_tensors == 0


def test_extremes_are_those_of_all_tensors():
    h = collected(torch.tensor([-3.0, 1.0]), torch.tensor([0.5, 0.25]), torch.tensor([-0.5]))
    assert (float(h.lowest), float(h.highest), float(h.least_peak)) == (-3.0, 1.0, 0.5)
    assert h.amax == 3.0 and (h.num_tensors, h.num_elements) == (3, 5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type_counts_as_its_float32_values(dtype):
    x = (torch.randn(5000) * 3).to(dtype)
    assert torch.equal(collected(x).bins, collected(x.float()).bins)


def test_memory_layout_does_not_matter():
    x = torch.randn(2, 8, 6, 10)
    for y in (x.to(memory_format=torch.channels_last), x.transpose(1, 3), x[:, ::2], x[..., 1:]):
        expected = collected(y.contiguous())
        assert torch.equal(collected(y).bins, expected.bins)


@pytest.mark.parametrize('scale', [1e-30, 1e-7, 2.0**-24, 1.0, 1e30])
@pytest.mark.parametrize('threads', [1, 3])
def test_both_ways_to_count_agree_at_any_scale(scale, threads, monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    torch.manual_seed(0)
    x = torch.randn(200_003) * scale
    h = collected(x)
    assert torch.equal(h.bins, count_by_histc(x, h.exponent))
    assert int(h.bins.sum()) == len(x)
    assert int(h.exponent) >= -24 and float(x.abs().max()) < 2.0 ** int(h.exponent)


def test_a_state_is_a_copy_that_torch_saves_as_plain_data(tmp_path):
    h = collected(torch.randn(100))
    torch.save(h.state_dict(), tmp_path / 'h.pth')
    again = Histogram()
    again.load_state_dict(torch.load(tmp_path / 'h.pth', weights_only=True))
    again.collect(torch.ones(7) * 50)
    h.collect(torch.ones(7) * 50)
    assert torch.equal(h.bins, again.bins) and h.amax == again.amax == 50


def test_histograms_merged_in_a_stack_are_those_merged_one_by_one():
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 300, 7, 1e-6, 1e5, 0, 1]
    firsts, seconds = (
        [Histogram.of(torch.randn(200, generator=generator) * size) for size in order]
        for order in (sizes, sizes[::-1])
    )
    wanted = [copy.copy(h) for h in firsts]
    for mine, other in strict_zip(wanted, seconds):
        mine.merge(other)
    _merge_stacked(list(strict_zip(firsts, seconds)))
    for found, right in strict_zip(firsts, wanted):
        assert int(found.bins.sum()) == found.num_elements == 400
        for name, value in right.state_dict().items():
            assert torch.equal(torch.as_tensor(vars(found)[name]), torch.as_tensor(value)), name
