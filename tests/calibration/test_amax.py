"""Range search against pytorch-quantization's own functions."""

import numpy as np
import pytest
import torch
from pytorch_quantization.calib import histogram as library

from mmdet3d_quant.calibration import bins as bins_module
from mmdet3d_quant.calibration.amax import SEARCHES, search_amax, search_many
from mmdet3d_quant.calibration.choose import Unit, search
from mmdet3d_quant.calibration.histogram import Histogram
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.fake_quant import fake_quantize
from mmdet3d_quant.core.spec import METHODS, Method, QuantSpec

INT8 = QuantSpec(8)
DEVICES = ['cpu', torch.device('cpu')] + ['cuda'] * torch.cuda.is_available()


def some(rng, n, top=100):
    return rng.integers(1, top, size=n)


def spikes(rng, n):
    """A few bins of few or many counts, nothing between."""
    counts = np.zeros(n)
    counts[some(rng, rng.integers(1, 8), n)] = 10 ** rng.integers(7)
    return counts


#: Counts of n bins: what layers give, and what makes candidates tie or leaves them empty.
SHAPES = {
    'half-normal': lambda r, n: r.poisson(1e3 * np.exp(-((np.arange(n) / n * 4) ** 2))),
    'exponential': lambda r, n: r.poisson(10 ** r.uniform(0, 5) * np.exp(-np.arange(n) / n * 9)),
    'heavy tail': lambda r, n: 10 ** r.uniform(2, 9) // (1 + np.arange(n)) ** r.uniform(1, 4),
    'zeros of a ReLU': lambda r, n: r.poisson(30, n) + (np.arange(n) == 0) * 10 ** r.integers(9),
    'spikes': spikes,
    'comb': lambda r, n: (np.arange(n) % r.integers(2, 9) == 0) * 7,
    'constant': lambda r, n: np.full(n, r.integers(1, 1000)),
    'ones': lambda r, n: r.integers(2, size=n),
    'huge': lambda r, n: r.integers(10 ** r.integers(1, 12), size=n),
    'first bins': lambda r, n: (np.arange(n) < r.integers(1, n)) * some(r, n),
    'last bins': lambda r, n: (np.arange(n) > r.integers(n)) * some(r, n),
    'bin 0': lambda r, n: (np.arange(n) == 0) * 5,
    'bin 0 and last': lambda r, n: (np.arange(n) % (n - 1) == 0) * 10 ** r.integers(6),
    'nothing': lambda r, n: np.zeros(n),
}
#: Edges of n bins up to about ``top``: of Histogram, of the library, its growth, and numpy's.
EDGES = {
    'power of two': lambda n, top: np.arange(n + 1) * 2.0 ** np.ceil(np.log2(top)) / 4096,
    'linspace': lambda n, top: torch.linspace(0, top, n + 1).numpy(),
    'grown': lambda n, top: (torch.arange(n + 1) * torch.linspace(0, top, 2049)[1]).numpy(),
    'from the smallest value': lambda n, top: np.linspace(top / 1000, top, n + 1),
}


def histograms(number, least, most, seed=0):
    """Counts, edges and grid of random histograms, all shapes and kinds of edges in turn."""
    rng = np.random.default_rng(seed)
    for i in range(number):
        n = int(rng.integers(least, most))
        counts = list(SHAPES.values())[i % len(SHAPES)](rng, n).astype(np.int64)
        edges = list(EDGES.values())[rng.integers(len(EDGES))](n, 10 ** rng.uniform(-4, 4))
        yield counts, edges, QuantSpec(int(rng.choice([2, 3, 4, 5, 6, 7, 8, 8, 8])))


@pytest.fixture
def theirs(monkeypatch):
    """The library's search; divergences that it calls NaN are infinite, and get counted."""
    monkeypatch.setattr(torch.Tensor, 'cuda', lambda self: self)
    undefined, entropy = [], library.entropy

    def defined(p, q):
        found = entropy(p, q)
        undefined.append(np.isnan(found))
        return np.inf if undefined[-1] else found

    def search(counts, edges, method, spec=INT8):
        undefined.clear()
        method, counts = Method.parse(method), counts.copy()
        if method.name == 'percentile':
            with np.errstate(invalid='ignore'):
                found = library._compute_amax_percentile(counts, edges, method.percentile)
            return float(found)
        function = getattr(library, f'_compute_amax_{method.name}')
        return float(function(counts, edges, spec.num_bits, False))

    monkeypatch.setattr(library, 'entropy', defined)
    search.undefined = undefined
    return search


def compare(cases, method, theirs):
    cases = list(cases)
    found = search_many([c[:2] for c in cases], method, [c[2] for c in cases])
    for (counts, edges, spec), ours in strict_zip(cases, found):
        assert ours == pytest.approx(theirs(counts, edges, method, spec), rel=1e-6)
        if method == 'entropy':  # the only exceptions, exactly
            assert any(theirs.undefined) == (not counts[1:128].any())


@pytest.mark.parametrize('percentile', [1, 50, 99, 99.99, 100])
def test_percentile_equals_the_library(percentile, theirs):
    compare(histograms(1500, 2, 2500), f'percentile:{percentile}', theirs)


@pytest.mark.parametrize('method', ['mse', 'entropy'])
def test_search_equals_the_library(method, theirs):
    compare(histograms(1400, 129, 145), method, theirs)
    compare(histograms(42, 200, 400, seed=1), method, theirs)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['mse', 'entropy'])
def test_search_equals_the_library_on_more_and_larger_histograms(method, theirs):
    compare(histograms(2800, 129, 300, seed=2), method, theirs)
    compare(histograms(14, 2048, 2049, seed=3), method, theirs)
    compare(histograms(14, 2049, 4097, seed=4), method, theirs)


def test_search_of_collected_statistics_equals_the_library(theirs):
    collected = Histogram()
    collected.collect(torch.randn(100_000, generator=torch.manual_seed(0)).relu_())
    counts, edges = collected.trimmed()
    assert len(counts) > 2048
    assert search_amax(counts, edges, 'mse') == pytest.approx(theirs(counts, edges, 'mse'))


def test_entropy_never_clips_everything_away():
    counts, edges = np.zeros(300, dtype=np.int64), np.arange(301.0)
    counts[250:] = 7
    assert float(library._compute_amax_entropy(counts.copy(), edges, 8, False)) == 250
    assert search_amax(counts, edges, 'entropy') > 250


@pytest.mark.parametrize('num_bits', range(2, 9))
def test_mse_is_the_least_of_all_candidates(num_bits):
    spec = QuantSpec(num_bits)
    cases = [case for case in histograms(70, 129, 700, seed=num_bits) if case[0].any()]
    found = search_many([c[:2] for c in cases], 'mse', spec)
    for (counts, edges, _), ours in strict_zip(cases, found):
        assert_least(counts, edges, ours, spec)


def test_mse_holds_where_squares_overflow_float32():
    counts = np.random.default_rng(0).poisson(1e3 * np.exp(-np.arange(400) / 50))
    with np.errstate(over='ignore', invalid='ignore'):
        ours = search_amax(counts, np.arange(401) * 2.0**80, 'mse')
    assert_least(counts, np.arange(401.0), ours / 2.0**80, QuantSpec())


def assert_least(counts, edges, found, spec):
    """Root of the error within float32 rounding of the least, by trying everything in float64."""
    centers = (edges[1:].astype(np.float64) + edges[:-1]) / 2

    def root(amax):
        step = amax / spec.format.qmax
        levels = np.minimum(np.rint(centers / step), spec.format.qmax)
        return np.sqrt((levels * step - centers) ** 2 @ counts)

    rounding = 1e-6 * np.sqrt(centers**2 @ counts)
    assert root(found) <= min(map(root, centers[128:])) * (1 + 1e-5) + rounding


@pytest.mark.parametrize('exponent', [-20, -24, -26, -28])
def test_ranges_that_are_hardly_any_equal_the_library(exponent, theirs):
    """Ranges of 2**-24 or less have no grid."""
    counts, edges = np.arange(400)[::-1], np.arange(401) * 2.0**exponent / 300
    assert search_amax(counts, edges, 'mse') == pytest.approx(theirs(counts, edges, 'mse'))


@pytest.mark.parametrize('method', ['max', 'percentile:99', 'entropy', 'mse'])
def test_many_equal_one_at_a_time_on_any_device_in_any_memory(method, monkeypatch):
    cases = list(histograms(30, 50, 900))
    pairs, specs = [c[:2] for c in cases], [c[2] for c in cases]
    before = [counts.copy() for counts, _ in pairs]
    found = search_many(pairs, method, specs)
    assert found == [search_amax(*pair, method, s) for pair, s in strict_zip(pairs, specs)]
    for device in DEVICES:
        assert found == search_many(pairs, method, specs, device)
    monkeypatch.setattr(bins_module, '_ELEMENTS', 1)
    assert found == search_many(pairs, method, specs)
    assert all(np.array_equal(x, c) for x, (c, _) in strict_zip(before, pairs))
    assert search_many(pairs, method) == search_many(pairs, method, INT8)
    assert search_many([], method) == []


@pytest.mark.parametrize('method', ['max', 'entropy', 'mse'])
def test_short_histograms_keep_all(method):
    for n in (1, 2, 127, 128):
        assert search_amax(np.ones(n), np.arange(n + 1.0), method) == n


@pytest.mark.parametrize('method', ['max', 'percentile', 'entropy', 'mse'])
def test_no_values_or_zeros_alone_give_a_number(method):
    for n in (1, 2, 200):
        assert search_amax(np.zeros(n), np.zeros(n + 1), method) == 0
        assert 0 <= search_amax(np.zeros(n), np.arange(n + 1.0), method) <= n


@pytest.mark.parametrize('text', ['maximum', 'percentile:0', 'percentile:abc', 'mse:3', ''])
def test_unknown_methods_are_refused(text):
    with pytest.raises(ValueError):
        Method.parse(text)


@pytest.mark.parametrize(
    'counts, edges, arguments, message',
    [
        (np.ones(3), np.arange(3.0), dict(method='max'), 'n counts and n'),
        (np.ones(0), np.arange(1.0), dict(method='max'), 'n counts and n'),
        (np.ones(3), np.array([0, 1, 2, 4.0]), dict(method='mse'), 'equally spaced'),
        (np.ones(3), np.arange(-1, 3.0), dict(method='mse'), 'equally spaced'),
        (np.ones(3), np.arange(4.0), dict(method='auto'), 'got auto'),
        (np.ones(3), np.arange(4.0), dict(method='mse', spec=[]), 'one spec per histogram'),
    ],
)
def test_what_does_not_fit_is_refused(counts, edges, arguments, message):
    with pytest.raises(ValueError, match=message):
        search_many([(counts, edges)], **arguments)


def test_every_method_has_its_search():
    assert set(METHODS) == {*SEARCHES, 'auto'}


def chosen(x, method):
    unit = Unit(('q',), Method.parse(method), Histogram.of(x), QuantSpec())
    return search([unit])[0]


@pytest.mark.parametrize('outlier', [1e2, 1e3, 17_000.0, 1e6])
@pytest.mark.parametrize('method', ['percentile:99.9', 'percentile:99.99', 'entropy'])
def test_an_outlier_does_not_take_the_resolution_of_the_rest(outlier, method):
    torch.manual_seed(0)
    x = torch.randn(1_000_000)
    alone, beside = chosen(x, method), chosen(torch.cat([x, torch.tensor([outlier])]), method)
    assert beside == pytest.approx(alone, rel=0.01)
    if method != 'entropy':
        share = float(method.split(':')[1]) / 100
        assert beside == pytest.approx(float(np.quantile(x.abs().numpy(), share)), rel=0.01)


@pytest.mark.parametrize('count', [1, 100])
def test_mse_of_a_view_counts_what_it_clips(count):
    """Brute force over the values, where the best range is far below the largest value."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(50_000), torch.full((count,), 40.0 / count)])
    x = torch.cat([x, torch.full((1,), 40.0)])
    amax = chosen(x, 'mse')
    x = x.abs()

    def error(limit):
        return float((fake_quantize(x, limit, QuantSpec()) - x).square().sum())

    assert error(torch.tensor(amax)) <= 1.02 * min(map(error, torch.logspace(0.3, 1.61, 300)))


@pytest.mark.parametrize('method', ['mse', 'entropy', 'percentile:99.99', 'max'])
@pytest.mark.parametrize('largest', [1e19, 3e38])
def test_the_largest_floats_have_ranges(largest, method):
    torch.manual_seed(0)
    x = torch.rand(10_000) * largest
    assert chosen(x, method) == pytest.approx(largest, rel=0.1)


def test_a_tensor_of_almost_zeros_keeps_its_values():
    x = torch.zeros(100_000)
    x[:5] = 3.0
    assert chosen(x, 'percentile:99.99') == 3.0
