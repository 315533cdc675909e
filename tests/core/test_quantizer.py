"""The quantizer against pytorch-quantization, and its life from uncalibrated to loaded."""

import copy

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict as load_leniently
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import fake_tensor_quant
from torch import nn

from mmdet3d_quant import UncalibratedError, quantizers, set_mode
from mmdet3d_quant.core import fake_quant
from mmdet3d_quant.core.fake_quant import fake_quantize
from mmdet3d_quant.core.modes import keep_float
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.core.spec import QuantSpec
from mmdet3d_quant.layers import QuantConv2d


def library(x, amax, num_bits=8):
    return fake_tensor_quant(x, amax, num_bits, False, False)


@pytest.fixture(params=[False, True], ids=['whole', 'pieces'])
def pieces(request, monkeypatch):
    """Also as if the tensors were too large for a cache."""
    if request.param:
        monkeypatch.setattr(fake_quant, '_CHUNK', 100)


@pytest.mark.usefixtures('pieces')
@pytest.mark.parametrize('num_bits', [4, 6, 8])
@pytest.mark.parametrize('axis', [None, 0, 1])
def test_values_and_gradients_equal_the_library(num_bits, axis):
    torch.manual_seed(0)
    x = torch.randn(6, 5, 7, 3) * 3
    amax = torch.tensor(4.0)
    if axis is not None:
        amax = torch.rand([x.shape[axis] if i == axis else 1 for i in range(4)]) * 4 + 0.5
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = fake_quantize(a, amax, QuantSpec(num_bits, axis))
    theirs = library(b, amax, num_bits)
    # An exact tie may round to either side: the scale is multiplied in one, divided in the other.
    step = (amax / (2 ** (num_bits - 1) - 1)).expand_as(x)
    differs = (ours - theirs).abs() > 1e-5
    assert differs.float().mean() < 1e-3
    assert ((ours - theirs).abs() <= step * 1.001).all()
    g = torch.randn_like(x)
    ours.backward(g)
    theirs.backward(g)
    assert torch.equal(a.grad, b.grad)
    assert (a.grad == 0).any() and (a.grad == g).any()


@pytest.mark.parametrize('axis', [None, 0])
def test_gradient_at_the_very_edge_is_the_library_s(axis):
    amax = torch.tensor([[0.3], [2.7]]) if axis == 0 else torch.tensor(0.3)
    edge = amax.expand(2, 1)
    beyond = torch.nextafter(edge, torch.tensor(torch.inf))
    below = torch.nextafter(edge, torch.tensor(0.0))
    values = torch.cat([edge, -edge, beyond, -beyond, below, -below], dim=1)
    a, b = values.clone().requires_grad_(), values.clone().requires_grad_()
    fake_quantize(a, amax, QuantSpec(axis=axis)).sum().backward()
    library(b, amax).sum().backward()
    assert a.grad.tolist() == b.grad.tolist() == [[1, 1, 0, 0, 1, 1]] * 2


def dtypes_with_relu():
    """Floating types of which a CPU takes a ReLU; float16 came with torch 2.1."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        try:
            torch.zeros(1, dtype=dtype).relu()
        except RuntimeError as err:
            yield pytest.param(dtype, marks=pytest.mark.skip(reason=f'torch: {err}'))
        else:
            yield dtype


@pytest.mark.usefixtures('pieces')
@pytest.mark.parametrize('learned', [False, True])
@pytest.mark.parametrize('dtype', list(dtypes_with_relu()))
@pytest.mark.parametrize('axis', [None, 0])
def test_a_relu_within_is_a_relu_before(dtype, axis, learned):
    torch.manual_seed(0)
    shape = (6, 1) if axis == 0 else (1,)
    amax = torch.rand(shape) + 0.5
    edges = [amax, torch.nextafter(amax, torch.tensor(torch.inf)), amax * 0, amax * 1e-9, -amax]
    edges = torch.cat([e.expand(6, 1) for e in edges], 1)
    x = torch.cat([torch.randn(6, 100), edges], 1).to(dtype)
    g = torch.randn(x.shape).to(dtype)
    results = []
    for inner in (True, False):
        a, r = x.clone().requires_grad_(), amax.clone().requires_grad_(learned)
        spec = QuantSpec(axis=axis)
        y = fake_quantize(a, r, spec, rectify=True) if inner else fake_quantize(a.relu(), r, spec)
        y.backward(g)
        results.append((y.detach(), a.grad, r.grad))
    (y, grad, slope), (y_apart, grad_apart, slope_apart) = results
    assert y.equal(y_apart) and grad.equal(grad_apart) and 0 < (grad != 0).sum() < x.numel()
    if learned:
        torch.testing.assert_close(slope, slope_apart)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_edge_is_right_in_every_type(dtype):
    """A range need not be a number of the type; the gradient passes up to the last one within."""
    for amax in (torch.tensor(0.3), torch.tensor(1.0), torch.tensor(300.7)):
        near = torch.linspace(0.97, 1.03, 5001, dtype=torch.float64).mul(amax.item())
        x = torch.cat([near, -near, amax[None].double()]).to(dtype).requires_grad_()
        fake_quantize(x, amax, QuantSpec()).sum().backward()
        assert x.grad.bool().equal(x.detach().double().abs() <= amax.item())
        assert x.grad.bool().any() and not x.grad.bool().all()


def by_autograd(x, amax, spec):
    """LSQ as its paper writes it, out of differentiable operations, with the step learned."""
    step = amax / spec.format.qmax
    n = x[0].numel() if amax.numel() == 1 else x.numel() / amax.numel()
    factor = 1 / (n * spec.format.qmax) ** 0.5
    step = (step - step * factor).detach() + step * factor  # the value of step, a scaled gradient
    ratio = x / step
    inside = (x.abs() <= amax).detach()
    whole = ratio.clamp(spec.format.qmin, spec.format.qmax).round()
    rounded = torch.where(inside, ratio + (whole - ratio).detach(), whole.detach())
    return rounded * step


@pytest.mark.usefixtures('pieces')
@pytest.mark.parametrize(('bits', 'axis'), [(8, None), (4, None), (8, 1), (3, 0)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_learned_ranges_get_lsq_s_gradient(bits, axis, dtype):
    torch.manual_seed(0)
    spec = QuantSpec(bits, axis)
    x = torch.randn(4, 5, 6, 7, dtype=dtype)
    shape = [x.shape[i] if i == axis else 1 for i in range(4)]
    amax = torch.rand(shape) + 0.5
    results = []
    for function in (fake_quantize, by_autograd):
        a, r = x.clone().requires_grad_(), amax.clone().requires_grad_()
        g = torch.linspace(-1, 2, x.numel(), dtype=dtype).view_as(x)
        function(a, r if function is fake_quantize else r.to(dtype), spec).backward(g)
        results.append((a.grad, r.grad))
    (ours, ours_range), (theirs, theirs_range) = results
    assert torch.allclose(ours, theirs) and ours_range.shape == amax.shape
    assert torch.allclose(ours_range, theirs_range.float(), rtol=1e-4, atol=1e-5)


def test_the_range_alone_can_be_learned():
    x, amax = torch.randn(100), torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, amax, QuantSpec(4)).sum().backward()
    assert amax.grad is not None and amax.grad != 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('axis', [None, 0])
def test_gradients_keep_half_types(dtype, axis):
    x = torch.randn(4, 50).to(dtype).requires_grad_()
    amax = torch.full((4, 1) if axis == 0 else (), 1.5, requires_grad=True)
    fake_quantize(x, amax, QuantSpec(axis=axis)).sum().backward()
    assert x.grad.dtype == dtype and amax.grad.dtype == torch.float32
    assert torch.equal(x.grad.bool(), x.detach().abs() <= 1.5)


@pytest.mark.usefixtures('same_optimizers')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('axis', [None, 0])
@pytest.mark.parametrize('learned', [False, True])
def test_one_graph_under_torch_compile(learned, axis, dtype):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(3, 40).to(dtype)
    results = []
    for run in (fake_quantize, torch.compile(fake_quantize, backend='aot_eager', fullgraph=True)):
        a = x.clone().requires_grad_()
        amax = torch.full((3, 1) if axis == 0 else (), 1.0, requires_grad=learned)
        y = run(a, amax, QuantSpec(4, axis))
        y.float().square().sum().backward()
        results.append((y.detach(), a.grad, amax.grad))
    (y, grad, grad_amax), (compiled, *grads) = results
    assert torch.equal(y, compiled) and y.dtype == dtype and torch.equal(grad, grads[0])
    if learned:
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        assert torch.allclose(grad_amax, grads[1], rtol=tolerance)


@pytest.mark.usefixtures('pieces')
@pytest.mark.parametrize('axis', [None, 0])
def test_steps_on_a_cpu_are_torch_s_own_operator(axis):
    """Bit for bit, ties between two steps of the grid among the values."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(8, 50), torch.randint(-300, 300, (8, 50)) / 2 * (2 / 127)], 1)
    amax = torch.full((8, 1) if axis == 0 else (1,), 2.0)
    scale, zeros = amax.flatten() / 127, torch.zeros(amax.numel(), dtype=torch.int32)
    if axis is None:
        expected = torch.fake_quantize_per_tensor_affine(x, scale, zeros, -128, 127)
    else:
        expected = torch.fake_quantize_per_channel_affine(x, scale, zeros, 0, -128, 127)
    assert torch.equal(fake_quantize(x, amax, QuantSpec(axis=axis)), expected)


def test_float64_path_is_the_same_function():
    x = torch.randn(1000) * 2
    amax = torch.tensor(2.5)
    single, double = (fake_quantize(t, amax, QuantSpec()) for t in (x, x.double()))
    assert torch.allclose(single.double(), double, atol=1e-6)


def test_grid_has_256_steps_and_saturates():
    x = torch.linspace(-3, 3, 10_001)
    y = fake_quantize(x, torch.tensor(1.0), QuantSpec())
    steps = (y * 127).round().unique()
    assert steps.min() == -128 and steps.max() == 127 and len(steps) == 256


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_types_keep_their_dtype(dtype):
    x = torch.randn(100).to(dtype)
    y = fake_quantize(x, torch.tensor(2.0), QuantSpec())
    assert y.dtype == dtype
    assert torch.equal(y, library(x.float(), torch.tensor(2.0)).to(dtype))


def test_dead_channel_gives_zero_not_nan():
    conv = QuantConv2d(2, 3, 1, bias=False)
    conv.weight.data[1] = 0
    conv._weight_quantizer.amax = conv.weight_amax()
    conv._input_quantizer.amax = 1.0
    y = conv(torch.randn(1, 2, 4, 4))
    assert torch.isfinite(y).all() and (y[:, 1] == 0).all()


def test_uncalibrated_is_an_error_that_names_the_layer_and_the_cure():
    model = nn.Sequential(QuantConv2d(3, 4, 1))
    with pytest.raises(UncalibratedError, match='input of QuantConv2d.*(?s:.)*tools/calibrate.py'):
        model(torch.zeros(1, 3, 2, 2))


def test_it_is_a_tensor_quantizer_with_the_library_names():
    conv = QuantConv2d(3, 4, 3)
    assert isinstance(conv._input_quantizer, TensorQuantizer)
    assert conv.input_quantizer is conv._input_quantizer
    assert conv._weight_quantizer._amax.shape == (4, 1, 1, 1)
    assert conv._input_quantizer.amax is None and not conv._input_quantizer.calibrated


def test_state_dict_round_trip_carries_calibration():
    source, target = QuantConv2d(3, 4, 1), QuantConv2d(3, 4, 1)
    assert list(source.state_dict()) == list(target.state_dict())
    source._input_quantizer.amax = 1.5
    source._weight_quantizer.amax = source.weight_amax()
    target.load_state_dict(source.state_dict())
    assert target._input_quantizer.calibrated and target._weight_quantizer.calibrated
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(source(x), target(x))


def test_uncalibrated_checkpoint_loads_and_stays_uncalibrated():
    target = QuantConv2d(3, 4, 1)
    target.load_state_dict(QuantConv2d(3, 4, 1).state_dict())
    assert not target._input_quantizer.calibrated


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -1.0, [1.0, 2.0]])
def test_bad_ranges_are_refused(bad):
    with pytest.raises(ValueError):
        Quantizer().amax = bad


def test_modes_restore_and_nest():
    conv = QuantConv2d(3, 4, 1)
    with set_mode(conv, 'float'):
        with set_mode(conv, 'observe'):
            assert {q.mode for q in quantizers(conv).values()} == {'observe'}
        assert {q.mode for q in quantizers(conv).values()} == {'float'}
    assert {q.mode for q in quantizers(conv).values()} == {'quant'}
    with pytest.raises(ValueError, match='unknown mode'):
        set_mode(conv, 'int8')


def test_kept_float_is_for_good_visible_and_ignores_a_range_in_a_checkpoint():
    model = nn.Sequential(QuantConv2d(3, 4, 1), nn.ReLU(), QuantConv2d(4, 4, 1))
    calibrated = copy.deepcopy(model)
    for q in quantizers(calibrated).values():
        q.amax = torch.ones_like(q._amax)
    keep_float(model, {'0': 'first layer'})
    keys = model.load_state_dict(calibrated.state_dict(), strict=True)
    assert not keys.missing_keys and not keys.unexpected_keys
    set_mode(model, 'quant')
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(model[0](x), nn.functional.conv2d(x, model[0].weight, model[0].bias))
    assert 'float: first layer' in repr(model)
    with pytest.raises(ValueError, match='matches no quantized layer.*0, 2'):
        keep_float(model, 'conv9')


@pytest.mark.parametrize('wrong', [torch.ones(10, 1, 1, 1), torch.ones(4)])
def test_a_range_of_another_shape_is_no_range(wrong):
    """Whether the loader is lenient, as mmengine's, or strict; an old range goes, too."""
    source = QuantConv2d(3, 4, 1)
    source._input_quantizer.amax = 1.5
    source._weight_quantizer.amax = source.weight_amax()
    state = dict(source.state_dict(), **{'_weight_quantizer._amax': wrong})
    for target in (QuantConv2d(3, 4, 1), copy.deepcopy(source)):
        load_leniently(target, state)
        assert target._input_quantizer.calibrated
        assert not target._weight_quantizer.calibrated and target._weight_quantizer.amax is None
        with pytest.raises(UncalibratedError, match='weight of QuantConv2d'):
            target(torch.ones(1, 3, 2, 2))
        shapes = rf'_weight_quantizer._amax.*\[{wrong.shape[0]}.*\[4, 1, 1, 1\]'
        with pytest.raises(RuntimeError, match=shapes):
            target.load_state_dict(state)
        load_leniently(target, source.state_dict())
        assert target._weight_quantizer.calibrated


def test_a_range_that_is_none_is_told_in_one_line():
    quantizer = Quantizer(QuantSpec(axis=0), channels=900, ndim=4, label='conv')
    wrong = torch.ones(900)
    wrong[3:] = -2.5
    with pytest.raises(ValueError, match=r'^conv: .* got -2.5 and 896 more$'):
        quantizer.amax = wrong
