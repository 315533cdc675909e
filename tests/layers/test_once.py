"""Rounding once for several readers: the same numbers, less work, and only where all agree."""

import copy

import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate, quantizers, set_mode
from mmdet3d_quant import quantizer as quantizer_module
from mmdet3d_quant.layers import QuantConv2d
from mmdet3d_quant.layers.once import rounded_once
from mmdet3d_quant.models import resnet
from mmdet3d_quant.models.resnet import QuantBasicBlock, QuantBottleneck
from mmdet3d_quant.quantizer import Quantizer


def blocks(kind, with_cp=False):
    """One with a convolution in its identity branch, one with an average pooling, one plain."""
    torch.manual_seed(0)
    out = 4 * kind.expansion
    conv = nn.Sequential(QuantConv2d(8, out, 1), nn.BatchNorm2d(out))
    pool = nn.Sequential(nn.AvgPool2d(1), QuantConv2d(out, out, 1), nn.BatchNorm2d(out))
    net = nn.Sequential(
        kind(8, 4, downsample=conv, with_cp=with_cp),
        kind(out, 4, downsample=pool, with_cp=with_cp),
        kind(out, 4, with_cp=with_cp),
    ).eval()
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    calibrate(net, [x.detach()], 'percentile:99')  # some values are beyond the range
    set_mode(net, 'quant')
    return net, x


@pytest.fixture
def count(monkeypatch):
    """Counts the roundings of activations."""
    calls = []
    genuine = quantizer_module.fake_quantize

    def counted(x, amax, spec):
        if spec.axis is None:
            calls.append(x.shape)
        return genuine(x, amax, spec)

    monkeypatch.setattr(quantizer_module, 'fake_quantize', counted)
    return calls


def results(net, x):
    """Output and all gradients."""
    net.zero_grad()
    x.grad = None
    y = net(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize('with_cp', (False, True))
@pytest.mark.parametrize('kind', (QuantBasicBlock, QuantBottleneck))
def test_values_and_gradients_are_those_of_rounding_twice(kind, with_cp, count, monkeypatch):
    net, x = blocks(kind, with_cp)
    once = results(net, x)
    shared = len(count)
    apart = {}

    def each(x, readers):
        apart['used'] = True
        return rounded_once(x, readers[:1])

    monkeypatch.setattr(resnet, 'rounded_once', each)
    twice = results(net, x)
    assert apart and len(count) - shared == shared + (4 if with_cp else 2)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert once[0].equal(twice[0])


@pytest.mark.parametrize('change', ('range', 'bits', 'float', 'learn', 'trace'))
def test_readers_that_differ_round_by_themselves(change, count):
    net, x = blocks(QuantBottleneck)
    net(x)
    before = len(count)
    plain = net[2]
    if change == 'range':
        plain.residual_quantizer.amax = plain.residual_quantizer.amax * 2
    elif change == 'bits':
        spec = plain.residual_quantizer.spec
        plain.residual_quantizer.spec = type(spec)(num_bits=4)
    elif change == 'float':
        plain.residual_quantizer.mode = 'float'
    elif change == 'learn':
        for quantizer in quantizers(plain).values():
            quantizer.learn()
    y = torch.randn_like(net[1](net[0](x)))
    count.clear()
    if change == 'trace':
        torch.jit.trace(plain, y.detach(), check_trace=False)
    else:
        found = plain(y)
        outputs = plain._main_branch(y) + plain.residual_quantizer(y)
        assert found.equal(outputs.relu())
        del count[-(3 if change == 'float' else 4) :]
    assert len(count) == (3 if change == 'float' else 4)
    assert before == 14 - 2


def test_a_changed_range_counts_at_once(count):
    net, x = blocks(QuantBottleneck)
    before = net(x)
    for name in ('residual_quantizer', 'conv1._input_quantizer'):
        quantizer = net[2].get_submodule(name)
        quantizer.amax = quantizer.amax / 4
    assert not net(x).equal(before)
    assert net(x).equal(copy.deepcopy(net)(x))


@pytest.mark.usefixtures('same_optimizers')
def test_compiled_blocks_are_one_graph():
    net, x = blocks(QuantBottleneck)
    compiled = torch.compile(net, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))


def test_an_error_leaves_the_quantizers_as_they_were():
    readers = [Quantizer(), Quantizer()]
    for quantizer in readers:
        quantizer.amax = 1.0
        quantizer.mode = 'quant'
    x = torch.tensor([0.3001, 5.0])
    with pytest.raises(RuntimeError), rounded_once(x, readers) as y:
        assert y.equal(readers[0](y)) and not y.equal(x)
        raise RuntimeError
    assert readers[1](x).equal(y)
