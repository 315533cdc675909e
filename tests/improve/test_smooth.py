"""SmoothQuant against the published formula by hand; float stays the same to the bit."""

import copy
import math

import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate, quantizers, set_mode
from mmdet3d_quant.improve import smooth_linears
from mmdet3d_quant.improve.channel_factors import ALPHAS
from mmdet3d_quant.layers import QuantLinear


class Tokens(nn.Module):
    """A block of a transformer without attention: norm, two readers, GELU, and what follows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.q, self.k = QuantLinear(8, 8), QuantLinear(8, 8, bias=False)
        self.last = QuantLinear(8, 8)
        with torch.no_grad():
            for tensor in (self.norm.weight, self.norm.bias):
                tensor[1] = 40.0  # an outlier channel
        self.eval()

    def forward(self, x):
        x = self.norm(x).roll((1,), (1,)).reshape(-1, 3, 8)
        return self.last(nn.functional.gelu(self.q(x) * self.k(x)))


def tokens(count=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 6, 8, generator=generator) for _ in range(count)]


@torch.no_grad()
def run(model, mode):
    with set_mode(model, mode):
        return torch.stack([model(x) for x in tokens()])


@pytest.mark.parametrize('alpha', [0.5, 0.8])
def test_factors_are_those_of_the_formula_to_a_power_of_two(alpha):
    model = Tokens()
    exact, plain = run(model, 'float'), copy.deepcopy(model)
    with torch.no_grad():
        peak = torch.cat([model.norm(x).flatten(0, 1) for x in tokens()]).abs().amax(0)
        weight = torch.cat([model.q.weight, model.k.weight]).abs().amax(0)
    formula = peak**alpha / weight ** (1 - alpha)
    result = smooth_linears(model, tokens(), alpha=alpha)
    (move,) = result.moves
    assert move.source == 'norm' and {r.layer for r in move.readers} == {'q', 'k'}
    factor = (plain.norm.weight / model.norm.weight).detach()
    off = factor.log2() - formula.log2()
    assert float(off.max() - off.min()) <= 1.0 + 1e-6  # but for rounding and a common power
    assert torch.equal(factor.log2(), factor.log2().round())
    for name in ('q', 'k'):
        changed = getattr(model, name).weight, getattr(plain, name).weight * factor
        assert torch.equal(*changed)
    assert torch.equal(exact, run(model, 'float'))
    assert 'gelu' in result.left['last'] or 'layer with a weight' in result.left['last']


def rounded(x, bits, peak):
    """Numbers of a grid by the definition: symmetric, the largest at the peak."""
    step = peak / (2 ** (bits - 1) - 1)
    return (x / step).round() * step


@torch.no_grad()
def error_by_hand(alpha):
    """Squared error of q and k, inputs of 6 bits and weights of 8, scaled by the formula."""
    model = Tokens()
    x = torch.cat([model.norm(x).flatten(0, 1) for x in tokens()]).double()
    weights = [model.q.weight.double(), model.k.weight.double()]
    peak = torch.cat(weights).abs().amax(0)
    factor = x.abs().amax(0) ** alpha / peak ** (1 - alpha) if alpha is not None else peak / peak
    power = factor.log2().round()
    factor = (power - power[1]).clamp(-8, 8).exp2()  # up to 256 times that of the outlier
    wrong = 0.0
    for w in weights:
        scaled = w * factor, x / factor
        got = rounded(scaled[1], 6, scaled[1].abs().max()) @ (
            rounded(scaled[0], 8, scaled[0].abs().amax(1, keepdim=True)).T
        )
        wrong += float((got - x @ w.T).square().sum())
    return wrong


def error_of_readers(alpha):
    """The same of the quantized model, smoothed by the code."""
    model = Tokens()
    for name, quantizer in quantizers(model).items():
        quantizer.num_bits = 6 if name.endswith('_input_quantizer') else 8
    result = smooth_linears(model, tokens(), ['q', 'k'], alpha)
    calibrate(model, tokens(), 'max')
    found = {'float': [], 'quant': []}
    for mode, outputs in found.items():
        hooks = [
            layer.register_forward_hook(lambda m, args, y, to=outputs: to.append(y))
            for layer in (model.q, model.k)
        ]
        run(model, mode)
        for hook in hooks:
            hook.remove()
    (move,) = result.moves
    pairs = zip(found['float'], found['quant'])
    return sum(float((y - z).double().square().sum()) for y, z in pairs), move.gain


def test_readers_gain_what_the_formula_gives_by_hand_and_a_search_finds_the_best():
    plain = error_by_hand(None)
    by_hand = {alpha: error_by_hand(alpha) for alpha in ALPHAS}
    for alpha, expected in by_hand.items():
        error, _ = error_of_readers(alpha)
        assert error == pytest.approx(expected, rel=0.02), alpha
    error, told = error_of_readers(None)
    assert error == pytest.approx(min(by_hand.values()), rel=0.02) and error < plain / 4
    assert told == pytest.approx(10 * math.log10(plain / error), abs=0.5)  # dB


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match=r'alpha must be in \[0, 1\]'):
        smooth_linears(Tokens(), tokens(), alpha=2)
    with pytest.raises(ValueError, match="'norm' names no quantized linear layer; these are: q, k"):
        smooth_linears(Tokens(), tokens(), ['norm'])
