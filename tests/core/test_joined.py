"""Rounding once, and with the ReLU: the same numbers, less work, and only where all agree."""

import copy
import gc
import sys
import weakref

import pytest
import torch
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from pytorch_quantization.nn import TensorQuantizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet3d_quant import calibrate, quantizers, set_mode, ties
from mmdet3d_quant.core import joined
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.layers import QuantConcat, QuantConv2d
from mmdet3d_quant.models.resnet import QuantBasicBlock, QuantBottleneck, QuantResLayer


class Stage(QuantResLayer):
    """Of given blocks."""

    def __init__(self, *blocks):
        nn.Sequential.__init__(self, *blocks)


def blocks(kind, **options):
    """One with a convolution in its identity branch, one with an average pooling, one plain."""
    torch.manual_seed(0)
    out = 4 * kind.expansion
    conv = nn.Sequential(QuantConv2d(8, out, 1), nn.BatchNorm2d(out))
    pool = nn.Sequential(nn.AvgPool2d(1), QuantConv2d(out, out, 1), nn.BatchNorm2d(out))
    net = Stage(
        kind(8, 4, downsample=conv, **options),
        kind(out, 4, downsample=pool, **options),
        kind(out, 4, **options),
    ).eval()
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    calibrate(net, [x.detach()], 'percentile:99')  # some values are beyond the range
    set_mode(net, 'quant')
    return net, x


class Work(TorchDispatchMode):
    """Counts what runs under it, backward included: passes that round, and ReLUs."""

    def __init__(self):
        super().__init__()
        self.roundings = self.relus = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.roundings += name.startswith(('round', 'fake_quantize'))
        self.relus += name in ('relu', 'relu_')
        return func(*args, **(kwargs or {}))


def listened(net):
    """A copy with a forward hook, that does nothing, on every quantizer: then none is joined."""
    net = copy.deepcopy(net)
    for quantizer in quantizers(net).values():
        quantizer.register_forward_hook(lambda *_: None)
    return net


def learn(net):
    for quantizer in quantizers(net).values():
        if quantizer.spec.axis is None:
            quantizer.learn()


def results(net, x):
    """Output and all gradients."""
    net.zero_grad()
    x.grad = None
    y = net(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters())]


PLUGIN = dict(cfg=dict(type='ContextBlock', ratio=0.5), position='after_conv1')


@pytest.mark.parametrize('learned', [False, True])
@pytest.mark.parametrize(
    ('kind', 'options'),
    [
        (QuantBasicBlock, {}),
        (QuantBasicBlock, dict(with_cp=True)),
        (QuantBottleneck, {}),
        (QuantBottleneck, dict(plugins=[PLUGIN])),  # which reads what is not rounded
    ],
)
def test_values_and_gradients_are_those_of_rounding_apart(kind, options, learned):
    net, x = blocks(kind, **options)
    if learned:
        learn(net)
    with Work() as joined:
        found = results(net, x)
    with Work() as apart:
        expected = results(listened(net), x)
    assert found[0].equal(expected[0])
    for a, b in strict_zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert joined.relus < apart.relus
    if learned:  # each learned range wants a gradient of its own
        assert joined.roundings == apart.roundings
    else:
        assert joined.roundings < apart.roundings


def test_one_block_saves_a_rounding_and_a_relu():
    """That of its input, which convolution and identity read; that before the second one."""
    block, x = blocks(QuantBasicBlock)[0][2], torch.randn(2, 4, 9, 9)
    with Work() as joined:
        block(x)
    with Work() as apart:
        listened(block)(x)
    assert (apart.roundings, apart.relus) == (5, 2)  # two of weights
    assert (joined.roundings, joined.relus) == (4, 1)


@pytest.mark.parametrize('change', ('range', 'bits', 'float', 'learn', 'stock'))
def test_readers_that_differ_round_by_themselves(change):
    net, x = blocks(QuantBottleneck)
    y = torch.randn_like(net[1](net[0](x))).requires_grad_()
    plain = nn.Sequential(net[2])
    block, residual = net[2], net[2].residual_quantizer
    if change == 'range':
        residual.amax = residual.amax * 2
    elif change == 'bits':
        residual.spec = type(residual.spec)(num_bits=4)
    elif change == 'float':
        residual.mode = 'float'
    elif change == 'learn':
        learn(plain)
    elif change == 'stock':
        block.residual_quantizer = TensorQuantizer()
        block.residual_quantizer.amax = residual.amax * 2
    found = results(plain, y)

    def apart(x):
        out, norm = block._main_branch(x)
        return (norm(out) + block.residual_quantizer(x)).relu()

    block.forward = apart
    for a, b in strict_zip(found, results(plain, y)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('grad', [False, True])
def test_a_trace_shows_every_quantizer(grad):
    block = blocks(QuantBottleneck)[0][2].requires_grad_(False)
    with torch.set_grad_enabled(grad), Work() as traced:
        torch.jit.trace(block, torch.randn(2, 16, 9, 9), check_trace=False)
    assert (traced.roundings, traced.relus) == (len(quantizers(block)), 3)


def test_evaluation_keeps_the_activations_and_gives_the_same():
    net, x = blocks(QuantBottleneck)
    with Work() as training:
        trained = net(x)
    with torch.no_grad(), Work() as evaluation:
        assert net(x).equal(trained)
    assert evaluation.roundings == training.roundings < len(quantizers(net))
    assert evaluation.relus == 3 * len(net)
    with torch.inference_mode():
        assert net(x.detach()).equal(trained)


@pytest.mark.parametrize('replace', [False, True])
def test_a_changed_range_counts_at_once(replace):
    net, x = blocks(QuantBottleneck)
    before = net(x)
    for name in ('residual_quantizer', 'conv1._input_quantizer'):
        quantizer = net[2].get_submodule(name)
        if replace:
            quantizer._amax = quantizer._amax / 4
        else:
            quantizer.amax = quantizer.amax / 4
    assert not net(x).equal(before)
    assert net(x).equal(copy.deepcopy(net)(x))


def test_who_listens_hears_the_same_in_training_and_evaluation():
    net, x = blocks(QuantBottleneck)
    heard = []
    net[1].register_forward_pre_hook(lambda m, args: heard.append([a.detach() for a in args]))
    net[1].register_forward_hook(lambda m, args, out: heard.append([out.detach()]))
    net[2].relu.register_forward_hook(lambda m, args, out: out * 0.5)
    trained = net(x)
    with torch.no_grad():
        assert net(x).equal(trained)
    half = len(heard) // 2
    for (a,), (b,) in strict_zip(heard[:half], heard[half:]):
        assert a.equal(b)
    assert half == 2


@pytest.mark.parametrize('kind', (QuantBasicBlock, QuantBottleneck))
def test_hooks_of_quantizers_see_what_is_not_rounded_and_see_it_once(kind):
    net, x = blocks(kind)
    expected = results(net, x)
    heard, readers = {}, {}
    for name, quantizer in quantizers(net).items():
        if quantizer.spec.axis is None:
            readers[name] = quantizer
            note = heard.setdefault(name, []).append
            quantizer.register_forward_hook(lambda m, args, y, note=note: note((args[0], y)))
    for a, b in strict_zip(results(net, x), expected):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        assert net(x).equal(expected[0])
    for name, quantizer in readers.items():
        (trained, rounded), (evaluated, _) = heard[name]
        assert trained.equal(evaluated) and not trained.equal(rounded)
        assert rounded.equal(joined.fake_quantize(trained, quantizer.amax, quantizer.spec))
    for group in ties(net):
        assert len({heard[name][0][0] for name in group}) == 1  # one tensor, for all


def test_a_hook_of_one_of_two_readers_sees_what_is_not_rounded():
    block, x = blocks(QuantBottleneck)[0][2], torch.randn(2, 16, 9, 9)
    heard = []
    block.residual_quantizer.register_forward_hook(lambda m, args, y: heard.append(args[0]))
    block(x)
    assert heard[0].equal(x)


@pytest.mark.parametrize('part', (QuantConv2d, QuantBottleneck))
@pytest.mark.parametrize('learned', [False, True])
def test_reentrant_checkpoints_change_nothing(part, learned):
    """Which compute anew from detached inputs, and in bfloat16 round beyond the range."""
    net, x = blocks(QuantBottleneck)
    if learned:
        for quantizer in quantizers(net).values():
            if quantizer.spec.axis is None:
                quantizer.learn()
    with torch.autocast('cpu', torch.bfloat16):
        plain = results(net, x)
        names = [name for name, module in net.named_modules() if isinstance(module, part)]
        turn_on_activation_checkpointing(net, names)
        for a, b in strict_zip(results(net, x), plain):
            assert a.equal(b)


def test_a_dispatch_mode_may_end_before_the_backward():
    net, x = blocks(QuantBasicBlock, with_cp=True)
    with Work():  # as torch's counter of operations
        y = net(x)
    y.sum().backward()
    assert x.grad.isfinite().all()


def quantizer_of(amax, mode='quant'):
    new = Quantizer()
    new.amax = amax
    new.mode = mode
    return new


def test_what_is_on_the_grid_passes_and_nothing_else():
    first, same, other = quantizer_of(1.0), quantizer_of(1.0), quantizer_of(1.1)
    x = torch.randn(100)
    y = first(x)
    assert not y.equal(x) and same(y) is y and first(y) is y
    assert not other(y).equal(y)
    for changed in (y * 0.3, y[:50] * 0.3, y.clone().mul_(0.3)):
        assert not first(changed).equal(changed)
    assert first(y.mul_(0.3)) is not y and not first(y).equal(y)
    same.amax = 2.0
    assert same(first(x)) is not first(x)


def test_notes_are_of_one_tensor(tmp_path):
    quantizer = quantizer_of(1.0)
    y = quantizer(torch.randn(10))
    z = copy.deepcopy(y).mul_(0.37).add_(0.001)
    assert not quantizer(z).equal(z)
    torch.save(y, tmp_path / 'y.pth')
    assert torch.load(tmp_path / 'y.pth', weights_only=True).equal(y)
    with torch.inference_mode():
        assert quantizer(copy.deepcopy(y)).equal(y)


def test_notes_die_with_their_tensor():
    quantizer, x = quantizer_of(1.0), torch.randn(10)

    def memory(count):
        rounded = [quantizer(x) for _ in range(count)]
        gone = [weakref.ref(y) for y in rounded]
        assert all(quantizer(y) is y for y in rounded)  # noted
        del rounded
        gc.collect()
        assert not any(ref() is not None for ref in gone)
        del gone
        return sys.getallocatedblocks()

    memory(2000)
    before = memory(2000)
    assert memory(2000) < before + 500


def test_a_concat_of_two_types_is_rounded_again():
    concat, reader = QuantConcat(), quantizer_of(2.3)
    concat._input_quantizer.amax = 2.3
    concat._input_quantizer.mode = 'quant'
    y = concat([torch.randn(1, 2, 8, 8).bfloat16(), torch.randn(1, 2, 8, 8)])
    assert y.dtype == torch.float32 and not reader(y).equal(y)


def test_a_concat_is_on_the_grid_of_its_inputs():
    concat, conv = QuantConcat(), QuantConv2d(4, 2, 1)
    x = [torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)]
    conv._weight_quantizer.amax = conv.weight_amax()
    set_mode(nn.ModuleList([concat, conv]), 'quant')
    concat._input_quantizer.amax = 1.5
    roundings = []
    for amax in (1.5, 1.6):
        conv._input_quantizer.amax = amax
        with Work() as work:
            y = conv(concat(x))
        parts = [concat._input_quantizer(t) for t in x]
        apart = conv._input_quantizer(torch.cat(parts, 1))
        assert y.equal(nn.functional.conv2d(apart, conv._weight_quantizer(conv.weight), conv.bias))
        roundings.append(work.roundings)
    assert roundings[0] < roundings[1]


@pytest.mark.usefixtures('same_optimizers')
def test_compiled_blocks_are_one_graph_with_the_same_gradients():
    net, x = blocks(QuantBottleneck)
    expected = results(net, x)
    compiled = torch.compile(net, backend='aot_eager', fullgraph=True)
    for a, b in strict_zip(results(compiled, x), expected):
        torch.testing.assert_close(a, b)


class Far(torch.Tensor):
    """As if on a GPU."""

    is_cpu = False
    reads = 0

    def item(self):
        Far.reads += 1
        return super().item()


def test_a_range_on_a_gpu_is_read_once_for_every_change():
    quantizer, x = quantizer_of(1.0), torch.randn(100)
    quantizer._amax = quantizer._amax.as_subclass(Far)
    y = quantizer(x)
    assert quantizer(y) is y and quantizer.grid == quantizer_of(1.0).grid and Far.reads == 1
    quantizer.amax = 2.0
    assert quantizer(y) is not y and quantizer.grid == quantizer_of(2.0).grid and Far.reads == 2
    quantizer._amax = quantizer._amax.clone()
    assert quantizer.grid == quantizer_of(2.0).grid and Far.reads == 3
    quantizer._amax.data = torch.tensor(3.0).as_subclass(Far)  # moved: as `module.to` does
    assert quantizer.grid == quantizer_of(3.0).grid and Far.reads == 4


def test_a_covered_tensor_needs_no_mask_until_either_changes():
    quantizer, x = quantizer_of(1.0), torch.full((5,), 2.0, requires_grad=True)  # a lie, to be seen
    passed = [torch.ones(5), torch.zeros(5)]

    def gradient(of=x):
        return torch.autograd.grad(quantizer(of).sum(), of)[0]

    joined.cover(x, quantizer._amax)
    assert gradient().equal(passed[0]) and gradient(x.detach().requires_grad_()).equal(passed[1])
    quantizer.amax = 1.0
    assert gradient().equal(passed[1])
    joined.cover(x, quantizer._amax)
    with torch.no_grad():
        x.mul_(1)
    assert gradient().equal(passed[1])
    joined.cover(x, quantizer._amax)
    quantizer._amax = quantizer._amax.clone()
    assert gradient().equal(passed[1])
