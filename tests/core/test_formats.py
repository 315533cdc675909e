"""Number formats: one that is only told of here is rounded to everywhere, and refused in files."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mmdet3d_quant import calibrate
from mmdet3d_quant.calibration.amax import search_amax
from mmdet3d_quant.calibration.health import examine
from mmdet3d_quant.calibration.histogram import Histogram
from mmdet3d_quant.core.fake_quant import fake_quantize
from mmdet3d_quant.core.formats import FORMATS, UINT8, Format
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.core.spec import QuantSpec
from mmdet3d_quant.export import export_onnx
from mmdet3d_quant.layers import QuantConv2d

LEVELS = np.array([0, 1, 2, 4.0])


@dataclass(frozen=True)
class Powers(Format):
    """0 and powers of two, of both signs."""

    fused = False
    even = False

    def round_(self, steps, rectify=False):
        if rectify:
            steps.clamp_(min=0)
        index = torch.bucketize(steps.abs(), steps.new_tensor([0.5, 1.5, 3]))
        return steps.copy_(self.levels().to(steps.dtype)[index] * steps.sign())

    def levels(self):
        return torch.tensor(LEVELS)


@pytest.fixture
def spec(monkeypatch):
    monkeypatch.setitem(FORMATS, 9, Powers('pow3', 3, -4, 4))
    return QuantSpec(9)


def nearest(values, numbers):
    """Each value's nearest number, by trying all."""
    return numbers[np.abs(values[..., None] - numbers).argmin(-1)]


INTEGERS = [fmt for fmt in (*FORMATS.values(), UINT8) if fmt.fused]


@pytest.mark.parametrize('fmt', INTEGERS, ids=lambda f: f.name)
def test_values_become_the_nearest_number(fmt):
    steps = np.random.default_rng(0).normal(0, 0.6 * fmt.qmax, 1000).astype(np.float32)
    numbers = np.arange(fmt.qmin, fmt.qmax + 1, dtype=np.float32)
    np.testing.assert_array_equal(fmt.rounded(steps), nearest(steps, numbers))
    assert len(numbers) == 2**fmt.bits
    assert fmt.step(torch.tensor(3.0)) * fmt.qmax == pytest.approx(3)
    if fmt.dtype is not None:
        info = torch.iinfo(fmt.dtype)
        assert (info.min, info.max, info.bits) == (fmt.qmin, fmt.qmax, fmt.bits)


def test_a_new_format_is_rounded_to(spec):
    torch.manual_seed(0)
    x = torch.randn(4, 500)
    both = np.concatenate([-LEVELS, LEVELS])
    y = fake_quantize(x, torch.tensor(2.0), spec)
    np.testing.assert_allclose(y, nearest(x.numpy(), 0.5 * both), atol=1e-6)
    y = fake_quantize(x, torch.tensor(2.0), spec, rectify=True)
    np.testing.assert_allclose(y, nearest(x.numpy(), 0.5 * LEVELS), atol=1e-6)
    assert 'pow3 ' in repr(Quantizer(spec)) and Quantizer(spec).num_bits == 9


def test_a_new_format_has_its_own_ranges_and_health(spec):
    torch.manual_seed(0)
    x = torch.randn(20000).abs()
    histogram = Histogram.of(x)
    counts, edges = histogram.trimmed()
    centers = (edges[1:] + edges[:-1]) / 2
    errors = [counts @ (nearest(centers, a / 4 * LEVELS) - centers) ** 2 for a in centers[128:]]
    found = search_amax(counts, edges, 'mse', spec)
    assert found == pytest.approx(centers[128 + int(np.argmin(errors))])
    with pytest.raises(ValueError, match='not pow3: take mse'):
        search_amax(counts, edges, 'entropy', spec)
    wrong = nearest(x.numpy(), found / 4 * LEVELS) - x.numpy()
    sqnr = 10 * math.log10((x.numpy() ** 2).sum() / (wrong**2).sum())
    assert examine(histogram, found, spec).sqnr == pytest.approx(sqnr, abs=0.05)


def test_weights_find_the_best_share_of_their_largest_value(spec):
    torch.manual_seed(0)
    conv = QuantConv2d(16, 4, 3)
    conv._weight_quantizer.spec = QuantSpec(9, axis=0)
    both = np.concatenate([-LEVELS, LEVELS])
    for weight, amax in zip(conv.weight.detach().double().numpy(), conv.weight_amax('mse')):
        tried = np.abs(weight).max() * np.arange(100, 19, -1) / 100
        errors = [((nearest(weight, a / 4 * both) - weight) ** 2).sum() for a in tried]
        assert float(amax) == pytest.approx(tried[int(np.argmin(errors))], rel=1e-5)


def test_what_onnx_has_no_type_for_is_exported_only_where_it_is_kept_float(spec, tmp_path):
    conv, x = QuantConv2d(3, 4, 1), torch.randn(1, 3, 8, 8)
    conv._input_quantizer.spec = QuantSpec(4)
    calibrate(conv, [x])
    with pytest.raises(ValueError, match='only int8 can .* _input_quantizer has int4'):
        export_onnx(conv, [x], tmp_path / 'm.onnx', ['x'], ['y'])
    conv._input_quantizer.keep_float('test')
    model = export_onnx(conv, [x], tmp_path / 'm.onnx', ['x'], ['y'])
    assert sum(n.op_type == 'QuantizeLinear' for n in model.graph.node) == 1  # the weight's
