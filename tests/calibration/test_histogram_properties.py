"""Histograms of whatever tensors against the sorted values themselves."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from mmdet3d_quant.calibration.amax import search_amax, search_many
from mmdet3d_quant.calibration.counting import count, count_by_histc
from mmdet3d_quant.calibration.histogram import Histogram
from mmdet3d_quant.core.formats import FORMATS
from mmdet3d_quant.core.spec import Method, QuantSpec
from tests.properties import deeper, holds

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def values(seed, size, scale, kind, dtype):
    """Random values: a kind of distribution, at a scale, as a tensor of some shape and layout."""
    rng = np.random.default_rng(seed)
    x = {
        'normal': lambda: rng.standard_normal(size),
        'heavy': lambda: rng.standard_cauchy(size),
        'relu': lambda: rng.standard_normal(size).clip(0),
        'outlier': lambda: np.r_[rng.standard_normal(size - 1), 1e4],
        'grid': lambda: rng.integers(-9, 10, size) / 8.0,
        'zeros': lambda: np.zeros(size),
        'octaves': lambda: 2.0 ** rng.integers(-150, 2, size) * rng.choice([-1, 1], size),
        'edges': lambda: np.nextafter(
            2.0 ** rng.integers(-20, 3, size).astype(np.float32),
            rng.choice([0, 9], size).astype(np.float32),
        ),
    }[kind]()
    top = float(torch.finfo(dtype).max) if dtype != torch.float64 else 3e38
    x = torch.tensor((x * 2.0**scale).clip(-top, top)).to(dtype)
    if size % 6 == 0:
        x = x.reshape(2, 3, -1).transpose(0, int(rng.integers(3)))
    return x


TENSOR = st.builds(
    values,
    st.integers(0, 2**32 - 1),
    st.one_of(st.integers(1, 40), st.integers(300, 1000)),
    st.one_of(st.integers(-12, 12), st.integers(-140, 120)),
    st.sampled_from(['normal', 'heavy', 'relu', 'outlier', 'grid', 'zeros', 'octaves', 'edges']),
    st.sampled_from(DTYPES),
)
TENSORS = st.lists(TENSOR, min_size=1, max_size=4)


def gathered(tensors):
    result = Histogram()
    for x in tensors:
        result.collect(x)
    return result


def ascending(tensors):
    """All absolute values, sorted, as float32 has them."""
    flat = np.concatenate([x.float().abs().flatten().numpy() for x in tensors])
    return np.sort(flat).astype(np.float64)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a
    )


@holds(25, tensors=TENSORS, octaves=st.integers(0, 15))
def test_counts_views_and_what_is_beyond_are_those_of_the_sorted_values(tensors, octaves):
    h, x = gathered(tensors), ascending(tensors)
    assert h.amax == x[-1] and h.num_elements == len(x) == int(h.bins.sum())
    assert h.num_tensors == len(tensors) and 2.0 ** int(h.exponent) > x[-1]
    assert float(h.least_peak) == min(float(t.float().abs().max()) for t in tensors)
    edges = np.r_[0, np.cumsum(h.widths())]
    below = np.searchsorted(x, edges[1:])  # values below the end of each bin
    assert np.array_equal(np.diff(np.r_[0, below]), h.bins.numpy())
    counts, width = h.view(octaves)
    ends = np.searchsorted(x, np.arange(1, len(counts) + 1) * width)
    assert np.array_equal(np.cumsum(counts), ends)
    beyond, rest = h.beyond(octaves), x[ends[-1] :]
    assert beyond.number == len(rest)
    # a centre is within half a bin, 1 / 4096 of the value, of each value
    assert abs(beyond.total - rest.sum()) <= rest.sum() / 4096
    assert abs(beyond.squares - (rest**2).sum()) <= (rest**2).sum() / 2000
    counts, edges = h.trimmed(octaves)
    assert len(edges) == len(counts) + 1 and counts.sum() == ends[-1]


@holds(15, tensors=TENSORS, seed=st.integers(0, 99), cut=st.integers(0, 4))
def test_neither_order_nor_splits_change_anything(tensors, seed, cut):
    whole = gathered(tensors)
    order = np.random.default_rng(seed).permutation(len(tensors))
    left, right = (
        gathered([tensors[i] for i in order[:cut]]),
        gathered([tensors[i] for i in order[cut:]]),
    )
    before = right.state_dict()
    left.merge(right)
    assert same(left, whole)
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(right.state_dict()[k]))
        for k, v in before.items()
    )
    read = Histogram()
    read.load_state_dict(whole.state_dict())
    assert same(read, whole)
    read.collect(tensors[0])  # what was read is no view of what was written
    assert same(whole, gathered(tensors))


@holds(25, x=TENSOR, more=st.integers(0, 30))
def test_both_ways_to_count_agree(x, more):
    flat = x.float().reshape(-1).contiguous()
    exponent = (torch.frexp(flat.abs().max()).exponent.clamp(min=-24) + more).clamp(max=128).int()
    assert torch.equal(count(flat, exponent), count_by_histc(flat, exponent))


@holds(25, tensors=TENSORS, share=st.one_of(st.floats(1, 100), st.floats(99, 100)))
def test_a_percentile_is_that_of_the_sorted_values(tensors, share):
    h, x = gathered(tensors), ascending(tensors)
    counts, edges = h.trimmed()
    found = search_amax(counts, edges, Method('percentile', share))
    low, high = (np.quantile(x, share / 100, method=m) for m in ('lower', 'higher'))
    assert low - edges[1] <= found <= high + edges[1]


def error_of(x, amax, fmt, counts=1):
    step = np.maximum(amax, 2.0**-24) / fmt.qmax
    return float((counts * (np.clip(np.rint(x / step), fmt.qmin, fmt.qmax) * step - x) ** 2).sum())


@holds(15, tensors=TENSORS, bits=st.sampled_from([4, 6, 8]))
def test_the_mse_range_is_as_good_as_any(tensors, bits):
    h, x = gathered(tensors), ascending(tensors)
    if not 2.0**-20 < x[-1] < 1e15:
        return
    counts, edges = h.trimmed()
    found = search_many([(counts, edges)], 'mse', QuantSpec(bits))[0]
    fmt = FORMATS[bits]
    centers = (edges[1:] + edges[:-1]) / 2
    if len(centers) > 128:
        errors = [error_of(centers, a, fmt, counts) for a in centers[128::7]]
        assert error_of(centers, found, fmt, counts) <= 1.02 * min(errors)
    tried = np.linspace(x[-1] * 129 / 2048, x[-1], 300)  # from where the search begins
    best = min(error_of(x, a, fmt) for a in tried[tried > edges[min(129, len(edges) - 1)]])
    # every value is known to half a bin
    slack = np.sqrt(len(x)) * edges[1] / 2
    assert np.sqrt(error_of(x, found, fmt)) <= np.sqrt(best * 1.02) + 2 * slack


@pytest.mark.slow
@pytest.mark.parametrize('check', deeper(__name__), ids=lambda c: c.__name__)
def test_with_more_examples(check):
    check()
