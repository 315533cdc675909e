"""Re-estimated batch norms against means and variances by brute force."""

import copy

import pytest
import torch
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.improve import NormReestimation
from mmdet3d_quant.layers import QuantConv2d
from tests.improve.models import calibrated, images, outputs


class Two(nn.Module):
    """Two convolutions with their norms."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.first = QuantConv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.b, self.second = QuantConv2d(6, 4, 3), nn.BatchNorm2d(4)
        for norm in (self.first, self.second):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x):
        return self.second(self.b(self.first(self.a(x)).relu()))


def moments(y):
    rows = y.double().transpose(0, 1).flatten(1)
    return rows.mean(1), rows.var(1, unbiased=False)


@torch.no_grad()
def by_brute_force(model, exact, x):
    """One norm after the other, on one batch, by whole passes over what is before it."""
    with mq.set_mode(exact, 'float'):
        wanted = [moments(exact.a(x)), moments(exact.b(exact.first(exact.a(x)).relu()))]
    for index, norm in enumerate((model.first, model.second)):
        with mq.set_mode(model, 'quant'):
            own = model.a(x) if index == 0 else model.b(model.first(model.a(x)).relu())
        (mean, var), (float_mean, float_var) = moments(own), wanted[index]
        norm.running_mean += (mean - float_mean).float()
        norm.running_var *= (var / float_var).float()


def test_statistics_are_those_of_brute_force_one_norm_after_the_other(monkeypatch):
    monkeypatch.setattr(NormReestimation, '_error', lambda *args: 0.0)  # whether it helps or not
    data = images()
    model = calibrated(Two(), data)
    step = NormReestimation(batches=lambda: [(0, data[0])])
    slow, exact = copy.deepcopy(model), copy.deepcopy(model)
    by_brute_force(slow, exact, data[0])
    step(model, [], [(0, data[0])])
    assert set(step.changed) == {'first', 'second'} and not step.undone
    for name, value in slow.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-6), name
    moved = {n for n, v in exact.state_dict().items() if not torch.equal(v, model.state_dict()[n])}
    assert moved == {f'{n}.running_{k}' for n in ('first', 'second') for k in ('mean', 'var')}


def test_a_planted_shift_is_repaired():
    """What a quantized layer makes is off, each channel by another factor, and shifted."""
    data = images(8)
    model = calibrated(Two(), data)
    exact = outputs(model, data, 'float')
    off = 1 + 0.3 * torch.rand(6, 1, 1, generator=torch.Generator().manual_seed(4))
    model.a.register_forward_hook(
        lambda layer, args, y: y * off + 0.2 if layer._weight_quantizer.mode == 'quant' else y
    )

    def error():
        return float((outputs(model, data, 'quant') - exact).square().mean())

    before = error()
    NormReestimation(['first'], lambda: enumerate(data[:4]))(model, [], list(enumerate(data[4:])))
    assert error() < before / 2


class Shift:
    """A step that moves the float model, and keeps what it is compared with."""

    exact = None

    def __call__(self, model, choices, held_out):
        self.seen = self.exact
        with torch.no_grad():
            model.a.weight += 0.3


def test_steps_that_follow_each_other_compare_with_the_float_model_as_it_was():
    """Norms take off what the step before did to the means, float and quantized alike."""
    data = images(8)
    exact = outputs(calibrated(Two(), data), data, 'float')
    errors = {}
    for name, between in dict(seen=[], forgotten=[lambda *_: None]).items():
        first, last = Shift(), NormReestimation(['first'], lambda: enumerate(data))
        model = calibrated(Two(), data, [first, *between, last])
        assert torch.equal(first.seen.a.weight, Two().a.weight)
        assert first.exact is None and last.exact is None
        mean = (outputs(model, data, 'quant') - exact).double().mean((0, 2, 3))
        errors[name] = float(mean.abs().max())
    assert errors['seen'] < errors['forgotten'] / 2


def test_what_does_not_help_on_other_batches_is_undone_and_told():
    data = images()
    model = calibrated(Two(), data)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step = NormReestimation(batches=lambda: [(0, 20 * torch.randn(2, 3, 6, 6) + 30)])
    step(model, [], list(enumerate(data)))
    assert step.undone and not step.changed and 'batch norms stay' in str(step)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_as_a_step_half_of_the_held_out_batches_judge():
    data = images(6)
    step = NormReestimation(['second'])
    model = calibrated(Two(), data, [step])
    assert set(step.changed) | set(step.left) <= {'second'} and step.errors[0] > 0
    if not step.undone:
        assert step.errors[1] <= step.errors[0]
    assert torch.equal(model.first.running_mean, torch.zeros(6))
    with pytest.raises(ValueError, match='needs a held-out batch|judged on a held-out batch'):
        NormReestimation()(model, [], [(0, data[0])])


def test_what_is_not_moved_stays_and_wrong_names_are_errors():
    data = images()
    model = calibrated(nn.Sequential(nn.BatchNorm2d(3), *Two().children()), data)
    step = NormReestimation(['0'], lambda: enumerate(data))
    step(model, [], list(enumerate(data)))
    assert step.left == {'0': 'quantization does not move what it reads'}
    with pytest.raises(ValueError, match="'none_such' names no batch norm.*: 0, 2, 4"):
        NormReestimation(['none_such']).layers(model)
    with pytest.raises(ValueError, match='quantized layers: there are none'):
        NormReestimation().layers(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))
