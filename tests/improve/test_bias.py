"""Bias correction against means by brute force."""

import copy

import pytest
import torch
from torch import nn

from mmdet3d_quant.improve import BiasCorrection
from mmdet3d_quant.improve.bias import NO_PLACE
from mmdet3d_quant.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear
from tests.improve.models import calibrated, images, outputs


def channel_means(y, axis):
    return y.mean([d for d in range(y.dim()) if d != axis])


LAYERS = {
    'conv': (lambda: QuantConv2d(3, 5, 3), 1),
    'grouped': (lambda: QuantConv2d(3, 6, 3, groups=3), 1),
    'transposed': (lambda: QuantConvTranspose2d(3, 5, 2, 2), 1),
    'linear': (lambda: QuantLinear(6, 4), -1),
}


@pytest.mark.parametrize('kind', LAYERS)
def test_means_of_a_layer_are_those_of_float(kind):
    make, axis = LAYERS[kind]
    torch.manual_seed(0)
    layer, data = make(), images()
    before = calibrated(copy.deepcopy(layer), data)
    after = calibrated(copy.deepcopy(layer), data, [BiasCorrection()])
    wanted = outputs(layer, data, 'float')
    axis = axis % wanted.dim()
    mean = channel_means(wanted, axis)
    off = (channel_means(outputs(before, data, 'quant'), axis) - mean).abs().max()
    left = (channel_means(outputs(after, data, 'quant'), axis) - mean).abs().max()
    assert off > 1e-3 and left < 1e-6
    # the bias moved by exactly the mean error, and nothing else did
    error = channel_means(outputs(before, data, 'quant') - wanted, axis)
    assert torch.allclose((layer.bias - after.bias).double(), error, atol=1e-6)
    rest = {k: v for k, v in after.state_dict().items() if k != 'bias'}
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in rest.items())


class Normed(nn.Module):
    """A convolution without bias before a batch norm, and one whose result two read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm = QuantConv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.b = QuantConv2d(5, 4, 1, bias=False)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x):
        return self.b(self.norm(self.a(x)).relu())


def test_a_batch_norm_takes_what_has_no_bias():
    data, correction = images(), BiasCorrection()
    before, after = calibrated(Normed(), data), calibrated(Normed(), data, [correction])
    assert torch.allclose(
        channel_means(outputs(nn.Sequential(after.a, after.norm), data, 'quant'), 1),
        channel_means(outputs(nn.Sequential(before.a, before.norm), data, 'float'), 1),
        atol=1e-6,
    )
    assert set(correction.corrected) == {'a'} and correction.left == {'b': NO_PLACE}
    assert 'b is left' in str(correction)
    changed = [
        k for k, v in after.state_dict().items() if not torch.equal(v, before.state_dict()[k])
    ]
    assert changed == ['norm.running_mean']


def test_only_what_is_named_is_corrected():
    data = images()
    net = nn.Sequential(QuantConv2d(3, 4, 3), nn.ReLU(), QuantConv2d(4, 4, 1))
    before = copy.deepcopy(net.state_dict())
    calibrated(net, data, [BiasCorrection(['2'])])
    assert torch.equal(net[0].bias, before['0.bias'])
    assert not torch.equal(net[2].bias, before['2.bias'])
    with pytest.raises(ValueError, match="'nothing' names no quantized layer"):
        calibrated(net, data, [BiasCorrection(['nothing'])])


def test_a_failed_calibration_leaves_biases(monkeypatch):
    data, net = images(), nn.Sequential(QuantConv2d(3, 4, 3))
    before = net[0].bias.clone()

    def fail(model, choices, held_out):
        raise RuntimeError('later')

    with pytest.raises(RuntimeError):
        calibrated(net, data, [BiasCorrection(), fail])
    assert torch.equal(net[0].bias, before)
