"""The kernels of a GPU against the operator of a CPU: on a GPU, or in Triton's interpreter.

Not collected by name: tests/core/test_kernels.py runs it in the interpreter, tests/test_gpu.py on
a GPU.
"""

import copy

import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate, quantizers, set_mode
from mmdet3d_quant.calibration.counting import BINS, count
from mmdet3d_quant.calibration.histogram import Histogram
from mmdet3d_quant.core import batch_norm, fused, grouped, opaque
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.fake_quant import compiling, fake_quantize
from mmdet3d_quant.core.joined import normed, rectified, rounded_once
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.core.spec import QuantSpec
from mmdet3d_quant.core.ties import share_ranges, ties
from mmdet3d_quant.layers import QuantConv2d
from mmdet3d_quant.models.resnet import QuantBottleneck
from mmdet3d_quant.qat.moving import LearnedRanges, WeightRanges

DEVICE = 'cuda' if torch.cuda.is_available() and not fused.INTERPRETED else 'cpu'
TYPES = [torch.float32, torch.float16]
# The interpreter cuts a float32 off where bfloat16 is rounded to nearest.
TYPES += [] if fused.INTERPRETED else [torch.bfloat16]
SHAPES = [(1,), (5,), (0, 3, 2, 2), (3, 5, 7, 2), (2, 8, 33, 9), (4099,), (2, 3, 4, 5, 6)]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture
def apart(monkeypatch):
    """Computes something on a CPU, without kernels."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(fused, 'AVAILABLE', False)
            return function('cpu', *args)

    return run


def rounded(device, x, amax, spec, rectify, inplace=False):
    """Value, gradient of the input and of the range."""
    leaf = x.detach().to(device).clone().requires_grad_()
    amax = amax.detach().to(device).clone().requires_grad_(amax.requires_grad)
    y = fake_quantize(leaf * 1, amax, spec, rectify, inplace=inplace)
    y.backward(torch.linspace(-1, 2, x.numel()).view_as(x).to(y))
    grad = None if amax.grad is None else amax.grad.cpu()
    return y.detach().cpu(), leaf.grad.cpu(), grad


def slope(x, y, grad, amax, rectify):
    """The gradient of a range, by its definition, in float64."""
    x, y, grad = x.double(), y.double(), grad.double()
    inside = (x > 0) & (x <= amax) if rectify else x.abs() <= amax
    features = x.numel() / x.shape[0]
    return (grad * torch.where(inside, y - x, y)).sum() / (amax * (features * 127) ** 0.5)


@pytest.mark.parametrize('rectify', [False, True])
@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype', TYPES)
def test_values_and_gradients_have_the_bits_of_a_cpu(apart, dtype, shape, last, rectify):
    if last and len(shape) not in LAST:
        pytest.skip('it has no channels')
    torch.manual_seed(0)
    x = torch.randn(shape).mul(2).to(dtype)
    x = x.contiguous(memory_format=LAST[len(shape)]) if last else x
    for bits in (8, 4):
        amax, spec = torch.tensor(1.7), QuantSpec(bits)
        assert fused.serves(x.to(DEVICE), amax.to(DEVICE), spec)
        there = rounded(DEVICE, x, amax, spec, rectify, inplace=True)
        here = apart(rounded, x, amax, spec, rectify)
        assert there[0].equal(here[0]) and there[1].equal(here[1])
        there = rounded(DEVICE, x, amax.requires_grad_(), spec, rectify)
        assert there[0].equal(here[0]) and there[1].equal(here[1])
        if x.numel() and bits == 8:
            grad = torch.linspace(-1, 2, x.numel()).view_as(x).to(dtype)
            wide = apart(rounded, x.float(), amax.detach(), spec, rectify)[0]
            wanted = slope(x, wide, grad, 1.7, rectify).float()
            torch.testing.assert_close(there[2], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('rectify', [False, True])
@pytest.mark.parametrize('dtype', TYPES)
def test_strange_values_have_the_bits_of_a_cpu(apart, dtype, rectify):
    inf, nan = float('inf'), float('nan')
    step = 1.5 / 127
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1.5, -1.5, 1e-30, 65504.0, -3e4])
    x = torch.cat([x, (torch.arange(-140, 140) + 0.5) * step]).to(dtype)
    for limit in (1.5, 0.0, 2.0**-30, 3e38):
        amax = torch.tensor(limit)
        here = apart(rounded, x, amax, QuantSpec(), rectify)
        there = rounded(DEVICE, x, amax, QuantSpec(), rectify)
        for a, b in strict_zip(here[:2], there[:2]):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)


def test_other_strides_and_types_are_left_to_the_other_operator(apart):
    x = torch.randn(4, 6, 5, 8)
    for other in (x[:, ::2], x.double(), x.transpose(1, 2), x.expand(2, 4, 6, 5, 8)):
        here = apart(rounded, other, torch.tensor(1.0), QuantSpec(), True)
        there = rounded(DEVICE, other, torch.tensor(1.0), QuantSpec(), True)
        assert here[0].equal(there[0]) and here[1].equal(there[1])


def test_a_gradient_may_come_in_another_order():
    x = torch.randn(2, 8, 6, 5, device=DEVICE)
    found = []
    for order in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone().requires_grad_()
        y = fake_quantize(leaf, torch.tensor(1.0, device=DEVICE), QuantSpec())
        grad = torch.linspace(-1, 1, x.numel(), device=DEVICE).view_as(x)
        y.backward(grad.contiguous(memory_format=order))
        found.append(leaf.grad)
    assert found[0].equal(found[1])


@pytest.mark.skipif(not opaque.AVAILABLE, reason='torch before 2.4 has no such operators')
@pytest.mark.usefixtures('same_optimizers')
@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('dtype', TYPES)
def test_compiled_code_leaves_the_gradient_of_a_range_to_the_kernel(monkeypatch, dtype, last):
    calls = []
    kernel = fused.slope
    monkeypatch.setattr(fused, 'slope', lambda *args: calls.append(args) or kernel(*args))

    def compute(x, amax):
        return fake_quantize(x * 2, amax, QuantSpec(), True).float()

    order = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 8, 33, 9).to(DEVICE, dtype).contiguous(memory_format=order)
    grad = torch.randn(2, 8, 33, 9, device=DEVICE)
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        run = torch.compile(compute, backend='aot_eager', fullgraph=True) if compiled else compute
        leaf = x.clone().requires_grad_()
        amax = torch.tensor(1.5, device=DEVICE, requires_grad=True)
        y = run(leaf, amax)
        y.backward(grad)
        found.append((y.detach(), leaf.grad, amax.grad))
    (y, *eager), (other, *grads) = found
    assert len(calls) == 1 and torch.equal(y, other)
    assert torch.equal(eager[0], grads[0])
    rounded_to = grad.to(dtype)  # the gradient in the type of the rounded tensor
    wanted = slope((x * 2).relu(), y, rounded_to, 1.5, rectify=False)
    torch.testing.assert_close(grads[1].double(), wanted, rtol=1e-3, atol=1e-5)


def reader(amax, learned=False):
    quantizer = Quantizer().to(DEVICE)
    quantizer.amax = amax
    if learned:
        quantizer.learn()
    return quantizer


def test_a_relu_in_place_takes_no_memory_of_its_own_unless_somebody_needs_its_input():
    x = torch.randn(2, 4, 6, 6, device=DEVICE, requires_grad=True)
    for inplace in (False, True):
        relu = nn.ReLU(inplace)
        y = x * 1
        before = y._version
        z = rectified(y, relu, [reader(1.0)])
        assert (z.data_ptr() == y.data_ptr()) is inplace
        assert (y._version > before) is inplace
    y = x.exp()  # which keeps its result
    z = rectified(y, nn.ReLU(True), [reader(1.0)])
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        z.sum().backward()
    y = x * 1
    assert rectified(y, nn.ReLU(True), [reader(1.0, learned=True)]).data_ptr() != y.data_ptr()
    assert rectified(x, nn.ReLU(True), [reader(1.0)]).data_ptr() != x.data_ptr()  # a leaf


def norm_of(channels, device):
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, -1, 1)
    nn.init.normal_(norm.bias)
    return norm.eval().to(device)


def through_norm(device, x, other, relu, amax, learned):
    """Value and all gradients of a norm, a sum, a ReLU and the rounding."""
    x = x.detach().to(device).requires_grad_()
    other = None if other is None else other.detach().to(device).requires_grad_()
    norm, quantizer = norm_of(x.shape[1], device), Quantizer().to(device)
    quantizer.amax = amax
    if learned:
        quantizer.learn()
    y = quantizer(normed(x, norm, nn.ReLU() if relu else None, [quantizer], other))
    y.backward(torch.linspace(-1, 2, x.numel()).view_as(x).to(y))
    found = [y.detach(), x.grad, norm.weight.grad, norm.bias.grad]
    found += [] if other is None else [other.grad]
    return [t.float().cpu() for t in found + ([quantizer._amax.grad] if learned else [])]


@pytest.mark.parametrize('learned', [False, True])
@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('add', [False, True])
@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('shape', [(2, 5, 11, 7), (1, 70, 9, 8), (2, 8, 40, 30), (1, 128, 9, 7)])
def test_a_norm_and_its_gradients_are_those_of_separate_passes(
    apart, shape, last, add, relu, learned
):
    torch.manual_seed(0)
    x, other = torch.randn(shape), torch.randn(shape) if add else None
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    # A range whose steps are powers of two and a tensor that hits no tie: no rounding flips.
    there = through_norm(DEVICE, x, other, relu, 1.7, learned)
    here = apart(through_norm, x, other, relu, 1.7, learned)
    assert ((there[0] - here[0]).abs() > 1e-5).float().mean() < 1e-4  # the last bit may round away
    for a, b in strict_zip(here[1:], there[1:]):
        scale = a.abs().max() + 1e-6
        wrong = (a - b).abs() > 1e-3 * scale + 1e-5
        assert wrong.float().mean() < 1e-4


def test_a_norm_is_joined_only_where_it_may_be():
    quantizer, x = reader(1.0), torch.randn(2, 4, 9, 9, device=DEVICE)
    spec, amax = quantizer.spec, quantizer._amax
    assert batch_norm.serves(x, norm_of(4, DEVICE), amax, spec)
    assert not batch_norm.serves(x, norm_of(4, DEVICE).train(), amax, spec)
    assert not batch_norm.serves(x, norm_of(4, DEVICE).double(), amax, spec)
    assert not batch_norm.serves(x[:, :, ::2], norm_of(4, DEVICE), amax, spec)
    assert not batch_norm.serves(x.double(), norm_of(4, DEVICE), amax, spec)
    seen = []
    norm = norm_of(4, DEVICE)
    norm.register_forward_hook(lambda *_: seen.append(1))
    normed(x.requires_grad_(), norm, nn.ReLU(), [quantizer])
    assert seen


class Net(nn.Module):
    """Two blocks, of which the second reads what the first has rounded."""

    def __init__(self, **options):
        super().__init__()
        down = nn.Sequential(QuantConv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.a = QuantBottleneck(8, 8, downsample=down, **options)
        self.b = QuantBottleneck(32, 8, **options)

    def forward(self, x):
        return self.b(self.a(x, self.b.rounded_for(), compiling()))


def calibrated(learned, options):
    """A net on a CPU, and the batch that its ranges are of."""
    torch.manual_seed(0)
    net = Net(**options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
    net.eval()
    x = torch.randn(2, 8, 12, 12)
    calibrate(net, [x], 'percentile:99')
    if learned:
        for quantizer in quantizers(net).values():
            if quantizer.spec.axis is None:
                quantizer.learn()
    return net, x


def blocks(learned, **options):
    """A calibrated net, tied, that compiles to one graph."""
    net, _ = calibrated(learned, options)
    share_ranges(net.to(DEVICE))
    if learned:
        LearnedRanges(net).attach(torch.optim.SGD(net.parameters(), lr=0.1))
    return net


def step(net, run, x, half):
    """Output and gradients by name, those of tied ranges summed."""
    net.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast(DEVICE, half or torch.bfloat16, enabled=half is not None):
        y = run(leaf)
    y.float().square().sum().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    for group in ties(net):
        grads = [found.pop(f'{n}._amax') for n in group if f'{n}._amax' in found]
        found.update({group[0]: sum(grads)} if grads else {})
    return dict(found, x=leaf.grad, y=y.detach())


@pytest.mark.skipif(not opaque.AVAILABLE, reason='torch before 2.4 has no such operators')
@pytest.mark.usefixtures('same_optimizers')
@pytest.mark.parametrize('half', [None, torch.float16])
@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('learned', [False, True])
def test_compiled_blocks_join_their_norms_as_eager_ones(monkeypatch, learned, last, half):
    calls = []
    kernel = batch_norm.backward
    monkeypatch.setattr(batch_norm, 'backward', lambda *a: calls.append(a) or kernel(*a))
    net = blocks(learned)
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 8, 12, 12, device=DEVICE).contiguous(memory_format=order)
    net.to(memory_format=order)
    torch._dynamo.reset()
    run = torch.compile(net, backend='aot_eager', fullgraph=True)
    for _ in range(2):
        wanted, joined = step(net, net, x, half), len(calls)
        calls.clear()
        found = step(net, run, x, half)
        assert len(calls) == joined and found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
        assert found['y'].equal(wanted['y'])
        if joined == 5:
            break
        assert joined == 6
        # What reads the output of the first block has two ranges now: it is rounded for none.
        net.b.residual_quantizer.amax = net.b.residual_quantizer.amax * 0.5
        calls.clear()
    else:
        pytest.fail('the output of the first block was rounded for both')


@pytest.mark.skipif(not opaque.AVAILABLE, reason='torch before 2.4 has no such operators')
@pytest.mark.usefixtures('same_optimizers')
@pytest.mark.parametrize(
    'change',
    ['float', 'checkpoint', 'hook', 'backward', 'branch', 'blocks', 'frozen', 'evaluation'],
)
def test_compiled_blocks_that_may_not_join_their_norms_compute_the_same(change):
    net = blocks(False, with_cp=change == 'checkpoint')
    x = torch.randn(2, 8, 12, 12, device=DEVICE)
    seen = []
    if change == 'float':
        set_mode(net.b, 'float')
    elif change == 'hook':
        reader = net.b.conv1._input_quantizer
        reader.register_forward_hook(lambda _, args, y: seen.append(args[0].shape))
    elif change == 'backward':
        scale = lambda *args: tuple(None if g is None else g * 3 for g in args[1])  # noqa: E731
        net.b.conv2.register_full_backward_hook(scale)
    elif change == 'branch':
        net.a.downsample.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    elif change == 'frozen':
        for parameter in net.parameters():
            parameter.requires_grad_(False)
    torch._dynamo.reset()
    run = torch.compile(net, backend='aot_eager')
    if change == 'evaluation':
        with torch.no_grad():
            assert run(x).equal(net(x))
        return
    wanted = step(net, net, x, None)
    if change == 'blocks':
        run = net
        for block in (net.a, net.b):
            block.compile(backend='aot_eager')
    found = step(net, run, x, None)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]  # hooks see the same
    assert len(seen) == (2 if change in ('hook', 'branch') else 0)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


def trained(device, learned, last, options, half=None):
    """Ranges, weights and gradients after two steps of training."""
    net, x = calibrated(learned, options)
    net.to(device)
    if last:
        net.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    set_mode(net, 'quant')
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    if learned:
        LearnedRanges(net).attach(optimizer)
    weights = WeightRanges(net)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast(device, half or torch.bfloat16, enabled=half is not None):
            y = net(x.to(device).requires_grad_())
        y.float().square().sum().backward()
        optimizer.step()
        weights.follow()
    found = {'y': y.detach(), **{n: p.grad for n, p in net.named_parameters()}, **net.state_dict()}
    return {name: value.float().cpu() for name, value in found.items()}


@pytest.mark.parametrize('options', [{}, {'with_cp': True}])
@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('learned', [False, True])
def test_training_is_that_of_a_cpu(apart, learned, last, options):
    there = trained(DEVICE, learned, last, options)
    here = apart(trained, learned, last, options)
    assert there.keys() == here.keys()
    for name, value in here.items():
        error = (there[name] - value).norm() / (value.norm() + 1e-6)
        assert error < (0.05 if '_amax' not in name else 0.3), name


def test_tied_ranges_are_rounded_once_and_move_as_if_apart():
    found = []
    for tied in (False, True):
        torch.manual_seed(0)
        net = nn.ModuleList(QuantConv2d(4, 4, 1) for _ in range(2)).to(DEVICE)
        x = torch.randn(2, 4, 9, 9, device=DEVICE, requires_grad=True)
        calibrate(net, [x.detach()], 'percentile:98', forward=lambda m, x: [c(x) for c in m])
        readers = [conv._input_quantizer for conv in net]
        for quantizer in readers:
            quantizer.amax = readers[0].amax
            quantizer.learn()
        net.quant_ties = lambda: [['0._input_quantizer', '1._input_quantizer']]
        ranges = LearnedRanges(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        ranges.attach(optimizer)
        assert readers[0].grid == readers[1].grid
        y = rounded_once(x, readers) if tied else x
        assert (y is not x) is tied
        both = [q(y) if tied else fake_quantize(x, q._amax, q.spec) for q in readers]
        assert (both[0] is both[1]) is tied
        sum((b * w).sum() for b, w in strict_zip(both, (1.0, 3.0))).backward()
        optimizer.step()
        found.append([x.grad, *(q._amax.detach() for q in readers)])
        assert found[-1][1].equal(found[-1][2])
        assert readers[0].grid == readers[1].grid
        with torch.no_grad():
            readers[0]._amax.mul_(2)
        assert readers[0].grid != readers[1].grid
    for a, b in strict_zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('exponent', [1, -24, 128, -3])
@pytest.mark.parametrize('n', [1, 4099, 20000])
def test_values_are_counted_as_on_a_cpu(apart, exponent, n):
    torch.manual_seed(0)
    x = torch.randn(n).clamp(-0.999, 0.999) * torch.rand(n) ** 8 * 2.0 ** (exponent - 1)
    x[::3] = 0
    limit = torch.tensor(exponent, dtype=torch.int32)
    there = count(x.to(DEVICE), limit.to(DEVICE)).cpu()
    assert there.equal(apart(lambda _: count(x, limit)))
    assert int(there.sum()) == n and there.shape == (BINS,)


def test_counting_waits_for_nothing():
    total, x = Histogram(), torch.randn(4, 5, 6, 7, device=DEVICE)
    mode = torch.cuda.get_sync_debug_mode() if DEVICE == 'cuda' else None
    try:
        if mode is not None:
            torch.cuda.set_sync_debug_mode('error')
        for scale in (1, 8, 0.1):
            part = Histogram()
            part.add(Histogram.of(x * scale))
            total.merge(part)
    finally:
        if mode is not None:
            torch.cuda.set_sync_debug_mode(mode)
    assert total.bins.device == x.device and int(total.bins.sum()) == 3 * x.numel()
    assert total.amax == float((x * 8).abs().max())


def test_weights_are_rounded_together_and_anew_when_they_change():
    torch.manual_seed(0)
    net = nn.Sequential(QuantConv2d(3, 16, 3), QuantConv2d(16, 8, 1, groups=2)).to(DEVICE)
    net[1].weight.data[3] = 0
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    calibrate(net, [x])
    ranges = WeightRanges(net)
    with torch.no_grad():
        net[0].weight.mul_(1.3)
    ranges.follow()
    for layer in net:
        amax = layer._weight_quantizer._amax
        assert amax.equal(layer.weight.detach().abs().amax((1, 2, 3), keepdim=True))
        together = grouped.rounded_together(layer._weight_quantizer, layer.weight)
        wanted = fake_quantize(layer.weight.detach().cpu(), amax.cpu(), QuantSpec(axis=0))
        assert together.detach().cpu().equal(wanted)
        together.backward(torch.ones_like(together))
        assert layer.weight.grad.equal(torch.ones_like(layer.weight))
    before = net(x)
    with torch.no_grad():
        net[0].weight.mul_(0.5)  # the ranges do not follow
    assert not net(x).equal(before)
    before.sum().backward()  # through the rounded weights of its own time
    layer = net[0]
    layer._weight_quantizer.amax = layer._weight_quantizer.amax * 0.3  # some are beyond
    layer.weight.grad = None
    grouped.rounded_together(layer._weight_quantizer, layer.weight).sum().backward()
    inside = layer.weight.detach().abs() <= layer._weight_quantizer.amax
    assert layer.weight.grad.equal(inside.float()) and not inside.all()
    seen = []
    layer._weight_quantizer.register_forward_hook(lambda *_: seen.append(1))
    net(x)
    assert seen
    other = copy.deepcopy(net)
    assert grouped.rounded_together(other[1]._weight_quantizer, other[1].weight) is None
    del ranges
    assert grouped.rounded_together(net[1]._weight_quantizer, net[1].weight) is None
