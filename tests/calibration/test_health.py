"""Health against the true error of the tensor, and every flag."""

import math

import pytest
import torch
from torch import nn

from mmdet3d_quant import CalibrationError, calibrate
from mmdet3d_quant.calibration.health import LEAST_SQNR, MOST_CLIPPED, examine, fit
from mmdet3d_quant.calibration.histogram import Histogram, NonFiniteError
from mmdet3d_quant.core.fake_quant import fake_quantize
from mmdet3d_quant.core.spec import QuantSpec
from mmdet3d_quant.layers import QuantConv2d

TENSORS = {
    'normal': lambda: torch.randn(100_000),
    'relu': lambda: torch.randn(100_000).relu() * 7,
    'heavy': lambda: torch.distributions.StudentT(3.0).sample((100_000,)),
    'uniform': lambda: torch.rand(100_000) - 0.5,
}


@pytest.mark.parametrize('kind', TENSORS)
@pytest.mark.parametrize('share', [1.0, 0.5, 0.1])
@pytest.mark.parametrize('bits', [8, 4])
def test_sqnr_and_clipping_are_those_of_the_tensor(kind, share, bits):
    torch.manual_seed(0)
    # Of the values' size: a histogram does not know that the grid has one more negative number.
    x, spec = TENSORS[kind]().abs(), QuantSpec(bits)
    amax = share * float(x.max())
    wrong = fake_quantize(x, torch.tensor(amax), spec) - x
    expected = 10 * math.log10(float(x.square().sum() / wrong.square().sum()))
    sqnr, clipped = fit(Histogram.of(x), amax, spec)
    assert sqnr == pytest.approx(expected, abs=0.3)
    assert clipped == pytest.approx(float((x > amax).float().mean()), abs=1e-4)


def test_each_oddity_has_its_flag():
    torch.manual_seed(0)
    x = torch.randn(10_000)

    def flags(*tensors, amax=None):
        h = Histogram()
        for t in tensors:
            h.collect(t)
        return set(examine(h, amax or h.amax, QuantSpec()).flags)

    assert flags(x) == set()
    assert flags(torch.zeros(10)) == {'dead'}
    assert flags(torch.full((10,), 3.0)) == {'constant'}
    assert flags(x, x * 40) == {'unsteady'}
    assert flags(x, torch.zeros(5)) == {'unsteady'}
    assert 'clipped' in flags(x, amax=1.0)
    outlier = torch.cat([x, torch.tensor([3000.0])])
    assert 'noisy' not in flags(x)
    assert examine(Histogram.of(outlier), 3000.0, QuantSpec()).sqnr > LEAST_SQNR  # the outlier is
    assert 'noisy' in flags(x * 0.01, amax=3.0) and MOST_CLIPPED < 0.32


def test_dead_inputs_and_bad_weights_stop_before_anything_is_set():
    model = nn.Sequential(QuantConv2d(2, 2, 1), nn.ReLU(), QuantConv2d(2, 2, 1))
    with torch.no_grad():
        model[0].weight.fill_(-1.0)
        model[0].bias.zero_()
    with pytest.raises(CalibrationError, match='saw nothing but zeros:\n  2._input_quantizer'):
        calibrate(model, [torch.rand(1, 2, 4, 4)])
    assert not model[0]._input_quantizer.calibrated
    with torch.no_grad():
        model[2].weight[0, 0] = float('nan')
    with pytest.raises(NonFiniteError, match='2.weight: 1 of 4 values'):
        calibrate(model, [])
