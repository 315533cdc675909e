"""Histograms against numpy, and range search against pytorch-quantization's own functions."""

import numpy as np
import pytest
import torch
from pytorch_quantization.calib import histogram as library

from mmdet3d_quant.amax import NUM_BINS, Histogram, NonFiniteError, search_amax
from mmdet3d_quant.spec import Method, QuantSpec


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


def histograms():
    """Random and adversarial histograms of the sizes that collection gives."""
    rng = np.random.default_rng(0)
    for n in (300, 1000, 2048):
        yield np.histogram(np.abs(rng.normal(size=20_000)), bins=n)
        yield np.histogram(rng.exponential(size=20_000), bins=n)
        yield np.histogram(np.abs(rng.standard_t(2, size=20_000)), bins=n)
        yield np.histogram(np.r_[np.zeros(9000), rng.uniform(size=1000)], bins=n)
    sparse = np.zeros(700, dtype=np.int64)
    sparse[[1, 5, 200, 699]] = 10, 1000, 3, 1
    yield sparse, np.linspace(0, 3.5, 701)
    late = np.zeros(500, dtype=np.int64)
    late[450:] = 7
    yield late, np.linspace(0, 1, 501)


CASES = list(histograms())


@pytest.fixture
def cpu_library(monkeypatch):
    """The library's mse moves its histogram to a GPU; here it stays."""
    monkeypatch.setattr(torch.Tensor, 'cuda', lambda self: self)


@pytest.mark.parametrize('case', range(len(CASES)))
@pytest.mark.parametrize('num_bits', [8, 4])
def test_search_equals_the_library(case, num_bits, cpu_library):
    hist, edges = CASES[case]
    spec = QuantSpec(num_bits)
    for percentile in (99.0, 99.99, 100.0):
        assert search_amax(hist, edges, Method('percentile', percentile)) == pytest.approx(
            float(library._compute_amax_percentile(hist.copy(), edges, percentile)), rel=1e-6
        )
    ours = search_amax(hist, edges, 'mse', spec)
    theirs = float(library._compute_amax_mse(hist.copy(), edges, num_bits, False))
    if ours != pytest.approx(theirs, rel=1e-6):  # float32 sums may order exact ties differently
        errors = [squared_error(hist, edges, amax, spec) for amax in (ours, theirs)]
        assert errors[0] <= errors[1] * (1 + 1e-6)


def squared_error(hist, edges, amax, spec):
    centers = (edges[1:] + edges[:-1]) / 2
    step = amax / spec.qmax
    return float((np.minimum(np.rint(centers / step), spec.qmax) * step - centers) ** 2 @ hist)


@pytest.mark.parametrize('case', [0, 1, 2, 3, 12])
def test_entropy_equals_the_library(case):
    hist, edges = CASES[case]
    assert search_amax(hist, edges, 'entropy') == pytest.approx(
        float(library._compute_amax_entropy(hist.copy(), edges, 8, False)), rel=1e-6
    )


@pytest.mark.parametrize('text', ['maximum', 'percentile:0', 'percentile:abc', 'mse:3', ''])
def test_unknown_methods_are_refused(text):
    with pytest.raises(ValueError):
        Method.parse(text)


def test_entropy_never_clips_everything_away():
    """All counts in the last bins: the library's divergence is NaN here, and it picks that."""
    hist, edges = CASES[13]
    assert search_amax(hist, edges, 'entropy') > 0.95
