"""SmoothQuant against the published formula by hand; float stays the same to the bit."""

import copy

import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate, quantizers, set_mode
from mmdet3d_quant.improve import smooth_linears
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


def tokens(count=3):
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


def test_an_outlier_costs_less_and_a_search_no_more():
    errors = {}
    for name, alpha in dict(plain=0.0, half=0.5, searched=None).items():
        model = Tokens()
        exact = run(model, 'float')
        for layer, quantizer in quantizers(model).items():
            quantizer.num_bits = 6 if layer.endswith('_input_quantizer') else 8
        if name != 'plain':
            smooth_linears(model, tokens(), alpha=alpha)
        calibrate(model, tokens(), 'max')
        for quantizer in quantizers(model.last).values():
            quantizer.mode = 'float'
        errors[name] = float((run(model, 'quant') - exact).square().sum())
    assert errors['half'] < errors['plain'] / 2 and errors['searched'] < errors['plain'] / 2


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match=r'alpha must be in \[0, 1\]'):
        smooth_linears(Tokens(), tokens(), alpha=2)
    with pytest.raises(ValueError, match="'norm' names no quantized linear layer; these are: q, k"):
        smooth_linears(Tokens(), tokens(), ['norm'])
