"""Fake quantization of random tensors against pytorch-quantization and numpy."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from pytorch_quantization.tensor_quant import fake_tensor_quant

from mmdet3d_quant.core.fake_quant import fake_quantize
from mmdet3d_quant.core.formats import FORMATS, MIN_AMAX
from mmdet3d_quant.core.spec import QuantSpec
from tests.properties import deeper, holds

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: Ranges beside the usual ones: none, less than the smallest that counts, none to be reached.
EXTREMES = (0.0, 1e-45, 1e-30, 2.0**-25, 2.0**-24, 2.0**-23, 1e10, 1e30, 3e38)


@st.composite
def cases(draw):
    """A tensor, its range(s) and the spec."""
    shape = draw(st.lists(st.integers(0, 5), min_size=0, max_size=4))
    axis = draw(st.one_of(st.none(), st.sampled_from(range(len(shape))))) if shape else None
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(DTYPES))
    number = 1 if axis is None else shape[axis]
    amax = 2.0 ** rng.uniform(-20, 10, number)
    if draw(st.booleans()):
        amax = rng.choice(EXTREMES, number)
    wide = amax.reshape([-1 if i == axis else 1 for i in range(len(shape))]) if shape else amax[0]
    x = rng.standard_normal(shape) * np.minimum(wide, 1e30)
    spec = QuantSpec(draw(st.integers(2, 8)), axis)
    if draw(st.booleans()):  # halfway between two numbers
        x = (rng.integers(-140, 140, shape) + 0.5) * np.minimum(wide, 1e30) / spec.format.qmax
    x = torch.from_numpy(np.asarray(x)).clamp(-6e4, 6e4).to(dtype)
    return x, torch.tensor(amax, dtype=torch.float32), spec


def by_numpy(x, amax, spec):
    """The definition, in the arithmetic that a type is computed in, and the size of a step."""
    kind = np.float64 if x.dtype == torch.float64 else np.float32
    amax = amax.numpy().astype(kind)
    if spec.axis is not None:
        amax = amax.reshape([-1 if i == spec.axis else 1 for i in range(x.dim())])
    elif not x.dim():
        amax = amax[0]
    fmt = spec.format
    step = np.maximum(amax, kind(MIN_AMAX)) / kind(fmt.qmax)
    value = x.to(torch.float64 if kind is np.float64 else torch.float32).numpy()
    with np.errstate(all='ignore'):
        y = np.clip(np.rint(value * (kind(1) / step)), fmt.qmin, fmt.qmax) * step
    return torch.from_numpy(np.asarray(y, kind)).to(x.dtype), np.broadcast_to(step, x.shape)


@holds(300, case=cases(), rectify=st.booleans())
def test_it_is_the_definition_whatever_shape_type_and_range(case, rectify):
    x, amax, spec = case
    if rectify and x.dtype == torch.float16 and torch.__version__.startswith('2.0.'):
        return  # which has no ReLU of it on a CPU
    y = fake_quantize(x, amax, spec, rectify)
    expected, _ = by_numpy(x.relu() if rectify else x, amax, spec)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert torch.equal(y, expected) and bool(torch.isfinite(y).all())
    if spec.axis is None and x.dtype != torch.float64:
        known = fake_quantize(x, amax, spec, rectify, value=float(amax))
        assert torch.equal(known, y)


@holds(200, case=cases())
def test_it_and_its_gradient_are_the_librarys(case):
    x, amax, spec = case
    # The library makes ranges of up to 2**-24 a step of 1 / MIN_AMAX, other types in their own.
    if x.dtype != torch.float32 or not x.numel() or float(amax.min()) <= MIN_AMAX:
        return
    wide = (
        amax.reshape([-1 if i == spec.axis else 1 for i in range(x.dim())]) if x.dim() else amax[0]
    )
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = fake_tensor_quant(theirs, wide, spec.num_bits, False, False)
    found = fake_quantize(ours, amax, spec)
    step = (wide / spec.format.qmax).expand_as(x)
    assert bool(((found - expected).abs() <= step * 1.0001).all())  # a tie may fall either way
    off = (found - expected).abs() > step * 1e-3
    place = (x / step).double()
    assert bool(((place - place.floor() - 0.5).abs()[off] < 1e-4).all())
    weight = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


@holds(100, case=cases())
def test_what_is_rounded_stays_and_lies_on_the_grid(case):
    x, amax, spec = case
    y = fake_quantize(x, amax, spec)
    if x.dtype in (torch.float32, torch.float64):
        assert torch.equal(fake_quantize(y, amax, spec), y)
        _, step = by_numpy(x, amax, spec)
        numbers = y.double().numpy() / step
        assert np.abs(numbers - np.rint(numbers)).max(initial=0) <= 1e-4
        assert set(np.rint(numbers).flatten()) <= set(
            range(FORMATS[spec.num_bits].qmin, FORMATS[spec.num_bits].qmax + 1)
        )


@pytest.mark.slow
@pytest.mark.parametrize('check', deeper(__name__), ids=lambda c: c.__name__)
def test_with_more_examples(check):
    check()
