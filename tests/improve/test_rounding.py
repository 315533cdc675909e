"""Learned rounding against brute force over all roundings, and what it leaves alone."""

import copy
import itertools

import pytest
import torch
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.core.modes import keep_float
from mmdet3d_quant.improve import LearnedRounding
from mmdet3d_quant.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear


def images(count=4, channels=3, size=8):
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(channels, channels, generator=generator)  # so that errors can cancel
    maps = [torch.rand(2, channels, size, size, generator=generator) for _ in range(count)]
    return [torch.einsum('oc,nchw->nohw', mix, x) for x in maps]


def calibrated(model, data, bits=4, after=(), activations=8):
    model.eval()
    for name, quantizer in mq.quantizers(model).items():
        quantizer.num_bits = bits if name.endswith('_weight_quantizer') else activations
    mq.calibrate(model, data, 'max', held_out=data, after=after)
    return model


def outputs(model, data, mode='quant'):
    with mq.set_mode(model, mode), torch.no_grad():
        return torch.cat([model(x).flatten() for x in data]).double()


def error(model, data, wanted):
    return float((outputs(model, data) - wanted).square().mean())


def steps_of(layer, weight):
    """Weight in steps of its grid, by the definition."""
    quantizer = layer._weight_quantizer
    return weight.double() / (quantizer.amax.double() / quantizer.spec.format.qmax)


@pytest.mark.parametrize('seed', range(6))
def test_nearly_as_good_as_the_best_of_all_roundings(seed):
    torch.manual_seed(seed)
    layer = QuantConv2d(8, 1, 1, bias=False)
    data = images(2, 8, 6)
    wanted = outputs(layer, data, 'float')
    calibrated(layer, data, bits=3)
    weight, grid = layer.weight.detach().clone(), layer._weight_quantizer
    nearest = error(layer, data, wanted)
    step = grid.amax / grid.spec.format.qmax
    errors = []
    for ups in itertools.product((0.0, 1.0), repeat=weight.numel()):
        number = (steps_of(layer, weight) + 1e-6).floor() + torch.tensor(ups).view_as(weight)
        with torch.no_grad():
            layer.weight.copy_(number.clamp(-3, 3) * step)
        errors.append(error(layer, data, wanted))
    with torch.no_grad():
        layer.weight.copy_(weight)
    LearnedRounding(qdrop=0.0)(layer, [], list(enumerate(data)))
    learned = error(layer, data, wanted)
    best = min(errors)
    assert best <= learned * (1 + 1e-6)
    assert learned <= best + 0.1 * (nearest - best)


class Net(nn.Module):
    """A stem, a residual block, an upward layer; a linear layer reads the means."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(QuantConv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = Residual(8)
        self.up = QuantConvTranspose2d(8, 6, 2, 2)
        self.deep = QuantConv2d(6, 6, 3, groups=6)
        self.last = QuantLinear(6, 5)
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x):
        x = self.deep(self.up(self.block(self.stem(x)))).relu()
        return self.last(x.permute(0, 2, 3, 1))


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a = QuantConv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.b = QuantConv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x):
        return (self.norm2(self.b(self.norm1(self.a(x)).relu())) + x).relu()


@pytest.fixture(scope='module')
def pair():
    """The net with weights to nearest, with learned ones, and the step."""
    data, net = images(), Net()
    before = calibrated(copy.deepcopy(net), data)
    step = LearnedRounding(steps=200)
    after = calibrated(copy.deepcopy(net), data, after=[step])
    return before, after, step


def test_a_net_at_4_bits_gains(pair):
    before, after, step = pair
    data = images(8)[4:]
    wanted = outputs(before, data, 'float')
    assert error(after, data, wanted) < 0.9 * error(before, data, wanted)
    assert 'rounding of 6 layers' in str(step)
    assert list(step.gains) == ['stem.0', 'block', 'up', 'deep', 'last']


def test_only_weights_change_each_to_a_number_beside_it(pair):
    before, after, step = pair
    old, new = before.state_dict(), after.state_dict()
    assert list(old) == list(new)
    assert {k for k in old if not torch.equal(old[k], new[k])} == {
        f'{name}.weight' for name in step.flipped
    }
    for name in step.flipped:
        layer = after.get_submodule(name)
        weight = layer.weight.detach()
        number, exact = steps_of(layer, weight), steps_of(layer, old[f'{name}.weight'])
        assert (number - number.round()).abs().max() < 1e-4
        number = number.round()
        assert ((number - exact).abs() < 1 + 1e-4).all() and number.abs().max() <= 7
        assert step.flipped[name] > 0
        # rounding to nearest, also in a net with its norms folded, gives these very numbers
        assert torch.equal(layer._weight_quantizer(weight), weight)


def test_numbers_survive_folding(pair):
    _, after, step = pair
    wanted = {n: steps_of(m, m.weight.detach()).round() for n, m in named(after, step)}
    folded = copy.deepcopy(after)
    mq.fold_bn(folded)
    for name, layer in named(folded, step):
        found = steps_of(layer, layer._weight_quantizer(layer.weight.detach()))
        assert torch.allclose(found.abs(), wanted[name].abs(), atol=1e-4), name


def named(model, step):
    return [(name, model.get_submodule(name)) for name in step.flipped]


def test_a_second_run_and_another_seed():
    data = images()
    first, second = (
        calibrated(Net(), data, after=[LearnedRounding(['block'], steps=50)]) for _ in range(2)
    )
    state = second.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in first.state_dict().items())
    again = LearnedRounding(['block'], steps=50)
    again(second, [], list(enumerate(data)))  # all weights are on the grid
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_where_learning_fails_flips_begin_at_nearest():
    data = images()
    step = LearnedRounding(['block'], steps=1, rate=1e3)
    calibrated(Net(), data, after=[step])
    before, after = step.gains['block']
    assert after < before


def test_what_makes_it_worse_is_undone_and_told(monkeypatch):
    module = 'mmdet3d_quant.improve.rounding'
    monkeypatch.setattr(f'{module}.polish', lambda chain, e, r, data, b: data.error(chain))
    data, net = images(), Net()
    before = calibrated(copy.deepcopy(net), data)
    step = LearnedRounding(steps=1, rate=1e3)
    after = calibrated(net, data, after=[step])
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())
    assert not step.gains and 'block is left: learned rounding leaves' in str(step)


def test_by_layer_each_is_alone():
    step = LearnedRounding(steps=20, by='layer')
    calibrated(Net(), images(), after=[step])
    assert set(step.gains) | set(step.left) == {
        'stem.0', 'block.a', 'block.b', 'up', 'deep', 'last'
    }  # fmt: skip


def test_layers_that_cannot_be_learned_are_named():
    net = Net()
    keep_float(net, {'deep': 'too small'})
    step = LearnedRounding(steps=1)
    calibrated(net, images(), after=[step])
    assert step.left['deep'] == 'its weight is float (too small)'
    net = QuantConv2d(3, 4, 1)
    net._weight_quantizer.num_bits = net._input_quantizer.num_bits = (4, 3)
    mq.calibrate(net, images(), after=[step])
    assert 'fp8' in step.left['']


@pytest.mark.parametrize(
    'wrong', [dict(by='part'), dict(steps=0), dict(qdrop=1.0), dict(patterns=['nothing'])]
)
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match='learned rounding'):
        LearnedRounding(**wrong).layers(Net())


def test_several_processes_are_refused_before_long_work(monkeypatch):
    monkeypatch.setattr('mmdet3d_quant.improve.rounding.get_world_size', lambda: 2)
    with pytest.raises(ValueError, match='one process'):
        LearnedRounding()
