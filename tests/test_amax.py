"""Range search against pytorch-quantization's own functions."""

import numpy as np
import pytest
import torch
from pytorch_quantization.calib import histogram as library

from mmdet3d_quant.amax import search_amax
from mmdet3d_quant.spec import Method, QuantSpec


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
