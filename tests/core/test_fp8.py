"""FP8 (E4M3) against torch's own cast, and against all its numbers, tried one by one."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.calibration.amax import search_amax
from mmdet3d_quant.calibration.health import examine
from mmdet3d_quant.calibration.histogram import Histogram
from mmdet3d_quant.core import fake_quant
from mmdet3d_quant.core.fake_quant import fake_quantize
from mmdet3d_quant.core.formats import FP8
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.core.spec import QuantSpec
from mmdet3d_quant.layers import QuantConv2d

casts = pytest.mark.skipif(not hasattr(torch, 'float8_e4m3fn'), reason='torch 2.1 brought the type')
#: The numbers from the definition: sign, 4 bits of exponent with bias 7, 3 of mantissa.
NUMBERS = np.array(
    [m / 8 * 2.0**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
)


def cast(x):
    """Torch's cast, which does not saturate, of what is saturated before."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


def nearest(values, numbers=NUMBERS):
    """Nearest numbers of each sign; of two that are as near the one with an even code."""
    far = np.abs(np.abs(values)[..., None] - numbers)
    odd = np.arange(len(numbers)) % 2
    return np.copysign(numbers[np.lexsort((np.broadcast_to(odd, far.shape), far))[..., 0]], values)


def awkward():
    """Every magnitude, all numbers, all ties and their neighbours, and what is no number."""
    bits = torch.arange(-(2**31), 2**31, 99991).to(torch.int32).view(torch.float32)
    ties = torch.from_numpy((NUMBERS[1:] + NUMBERS[:-1]) / 2).float()
    near = [torch.nextafter(ties, ties.new_tensor(to)) for to in (-math.inf, math.inf)]
    more = [464.0, 464.1, 1e30, math.inf, 2.0**-10, 2.0**-11, 1e-45, 0.0]
    x = torch.cat([torch.from_numpy(NUMBERS).float(), ties, *near, torch.tensor(more)])
    return torch.cat([bits, x, -x, torch.tensor([math.nan])])


def same(a, b):
    """Equal, zeros in their sign, too; all NaN are."""
    alike = (a == b) & (torch.signbit(a) == torch.signbit(b))
    return bool((alike | (a.isnan() & b.isnan())).all())


@casts
def test_it_rounds_as_torch_casts():
    x = awkward()
    assert len(x) > 40000 and same(FP8.round_(x.clone()), cast(x))
    assert same(FP8.round_(x.clone(), rectify=True), cast(x.relu()))
    codes = cast(x).to(torch.float8_e4m3fn).view(torch.uint8)[:-1]
    assert FP8.encoded(x[:-1].numpy()) == codes.numpy().tobytes()
    strided = torch.stack([x, x])[:, ::2].t()
    assert same(FP8.round_(strided.clone(memory_format=torch.preserve_format)), cast(strided))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_it_rounds_to_the_nearest_number(dtype):
    torch.manual_seed(0)
    x = torch.randn(5000, dtype=dtype) * 2.0 ** torch.randint(-12, 9, (5000,))
    ties = torch.from_numpy((NUMBERS[1:] + NUMBERS[:-1]) / 2).to(dtype)
    x = torch.cat([x.clamp(-448, 448), ties, -ties])
    assert np.array_equal(FP8.round_(x.clone()).numpy(), nearest(x.numpy()))
    assert np.array_equal(FP8.levels(), NUMBERS) and FP8.least == NUMBERS[1]


@casts
@pytest.mark.parametrize('pieces', [100, 2**19])
@pytest.mark.parametrize('axis', [None, 0, 1])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_and_its_gradient(pieces, axis, dtype, monkeypatch):
    monkeypatch.setattr(fake_quant, '_CHUNK', pieces)
    torch.manual_seed(0)
    x = (torch.randn(6, 5, 7, 3) * 3).to(dtype)
    shape = [x.shape[axis] if i == axis else 1 for i in range(4)]
    amax = torch.tensor(4.0) if axis is None else torch.rand(shape) * 4 + 0.5
    spec = QuantSpec((4, 3), axis)
    inverse = 1 / (amax / 448)
    expected = (cast(x.float() * inverse) * (amax / 448)).to(dtype)
    a = x.clone().requires_grad_()
    found = fake_quantize(a, amax, spec)
    assert torch.equal(found, expected) and found.dtype == dtype
    assert torch.equal(fake_quantize(x, amax, spec), expected)
    g = torch.randn(x.shape).to(dtype)
    found.backward(g)
    assert torch.equal(a.grad, torch.where(x.abs() <= amax, g, 0))
    assert (a.grad == 0).any()


def test_a_learned_range_has_the_slope_of_what_it_rounds():
    """By the range, a rounded value changes as (y - x) / amax inside and as the limit beyond."""
    torch.manual_seed(0)
    x, amax = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor(1.5).requires_grad_()
    y = fake_quantize(x, amax, QuantSpec((4, 3)))
    y.sum().backward()
    y, limit = y.detach(), amax.item()
    slope = torch.where(x.abs() <= limit, y - x, y).sum() / limit / (3 * 8 * 8 * 448) ** 0.5
    assert float(amax.grad) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.skipif(
    torch.__version__.startswith('2.0.'), reason='torch 2.0 compiles no views of another type'
)
@pytest.mark.usefixtures('same_optimizers')
def test_compiled_code_rounds_alike():
    torch.manual_seed(0)
    quantizer = Quantizer(QuantSpec((4, 3)))
    quantizer.amax = 2.0
    a = torch.randn(4, 50, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    found = torch.compile(quantizer, backend='aot_eager', fullgraph=True)(a)
    expected = quantizer(b)
    assert torch.allclose(found, expected, atol=1e-7)
    for y in (found, expected):
        y.square().sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_mse_searches_on_the_numbers_of_fp8_and_entropy_is_refused():
    torch.manual_seed(0)
    x = torch.randn(20000).abs() ** 3
    histogram, spec = Histogram.of(x), QuantSpec((4, 3))
    counts, edges = histogram.trimmed()
    centers = (edges[1:] + edges[:-1]) / 2
    found = search_amax(counts, edges, 'mse', spec)

    def error(amax):
        steps = np.minimum(centers * 448 / amax, 448)
        return counts @ (nearest(steps) * amax / 448 - centers) ** 2

    tried = [error(amax) for amax in centers[128::100]]
    assert error(found) <= min(tried) * (1 + 1e-6)
    assert found != search_amax(counts, edges, 'mse', QuantSpec())
    assert search_amax(counts, edges, 'max', spec) == search_amax(counts, edges, 'max')
    with pytest.raises(ValueError, match='numbers one step apart, not fp8: take mse'):
        search_amax(counts, edges, 'entropy', spec)
    health = examine(histogram, found, spec)
    wrong = nearest(np.minimum(x.numpy() * 448 / found, 448)) * found / 448 - x.numpy()
    sqnr = 10 * math.log10((x.numpy() ** 2).sum() / (wrong**2).sum())
    assert health.sqnr == pytest.approx(sqnr, abs=0.1)
    assert health.lost == pytest.approx(float((x < found / 448 * 2**-10).float().mean()), abs=0.01)


def test_bits_that_a_peak_takes():
    assert [FP8.bits_used(p) for p in (0, 2.0**-11, 2.0**-9, 7 * 2.0**-9)] == [0, 0, 2, 4]
    assert 7.9 < FP8.bits_used(448) == FP8.bits_used(1e6) <= 8


def test_a_whole_layer():
    torch.manual_seed(0)
    conv, x = QuantConv2d(3, 4, 3), torch.randn(2, 3, 16, 16)
    for quantizer in (conv._input_quantizer, conv._weight_quantizer):
        quantizer.num_bits = (4, 3)
    calibrate(conv, [x], method='max')
    steps = [float(x.abs().max()) / 448, conv.weight.detach().abs().amax((1, 2, 3)) / 448]
    wide = steps[1].reshape(-1, 1, 1, 1)
    rounded = [
        torch.from_numpy(nearest((t.detach() / s).numpy().clip(-448, 448))).float() * s
        for t, s in ((x, steps[0]), (conv.weight, wide))
    ]
    expected = nn.functional.conv2d(*rounded, conv.bias)
    assert torch.allclose(conv(x), expected, atol=2e-2)
    assert 'fp8 axis=0' in repr(conv._weight_quantizer)


def test_a_state_dict_tells_the_format_its_ranges_are_for(tmp_path):
    def quantizer(bits):
        return nn.Sequential(Quantizer(QuantSpec(bits), label='mine'))

    model = quantizer((4, 3))
    model[0].amax = 3.0
    torch.save(model.state_dict(), tmp_path / 'fp8.pth')
    state = torch.load(tmp_path / 'fp8.pth')
    assert list(state) == ['0._amax']
    again = quantizer((4, 3))
    again.load_state_dict(state)
    assert float(again[0].amax) == 3
    for bits in (8, 4):
        other = quantizer(bits)
        match = f'format mismatch for 0._amax: calibrated for fp8, and this quantizer is int{bits}'
        with pytest.raises(RuntimeError, match=match):
            other.load_state_dict(state)
        assert other[0].amax is None
    other[0].amax = 2.0
    with pytest.raises(RuntimeError, match='calibrated for integers, and this quantizer is fp8'):
        quantizer((4, 3)).load_state_dict(other.state_dict())
    quantizer(8).load_state_dict(other.state_dict())  # integers of another width
    again.load_state_dict(dict(other.state_dict()))  # which says nothing of its modules
    assert float(again[0].amax) == 2
    quantizer((4, 3)).load_state_dict(quantizer(8).state_dict())  # no range at all
