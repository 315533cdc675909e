"""Adds and concats in forwards of somebody else: what is rounded, against the sums by hand."""

import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate, quantizers, set_mode
from mmdet3d_quant.core.ties import ties
from mmdet3d_quant.models.convert import quantize

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def conv(channels=4):
    return nn.Conv2d(channels, 4, 1)


def built(kind, *args):
    """A calibrated module, and its quantizers by name."""
    torch.manual_seed(0)
    model = kind(*args).eval()
    quantize(model, True, [[X]])
    calibrate(model, [X], 'max')
    return model, quantizers(model)


class Tree(nn.Module):
    """A module inside one of its own class: the same code, other quantizers."""

    def __init__(self, depth):
        super().__init__()
        self.conv = conv()
        self.child = Tree(depth - 1) if depth else None

    def forward(self, x):
        y = self.conv(x)
        y = y if self.child is None else self.child(y)
        return x + y


def test_a_module_inside_one_of_its_class_has_quantizers_of_its_own():
    model, q = built(Tree, 2)
    names = [n for n in q if 'quant_joins' in n]
    assert names == ['child.child.quant_joins.add0', 'child.quant_joins.add0', 'quant_joins.add0']

    def by_hand(tree, at, x):
        y, own = tree.conv(x), q[f'{at}quant_joins.add0']
        if tree.child is None:  # y is the convolution's alone
            return own(x) + y
        return own(x) + own(by_hand(tree.child, f'{at}child.', y))

    with torch.no_grad():
        assert torch.equal(model(X), by_hand(model, '', X))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = conv(), conv()

    def forward(self, x):
        y = nn.functional.avg_pool2d(self.first(x), 3, 1, 1)
        self.alias = y
        y += self.second(x)
        return y


def test_a_sum_in_place_changes_the_tensor_that_others_hold():
    model, q = built(InPlace)
    with torch.no_grad():
        out = model(X)
        x = nn.functional.avg_pool2d(model.first(X), 3, 1, 1)
        wanted = q['quant_joins.add0'](x) + model.second(X)
    assert model.alias is out and torch.equal(out, wanted)
    model(X).sum().backward()
    assert model.first.weight.grad.abs().sum() > 0


class Loop(nn.Module):
    """Sums of a builtin and of a loop: one instruction, several adds."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(conv() for _ in range(4))

    def forward(self, x):
        x = x + 1  # no meeting
        y = sum(c(x) for c in self.convs[:2])
        for c in self.convs[2:]:
            y = torch.add(y, c(x), alpha=2)
        return y


def test_every_turn_of_a_loop_is_an_add_of_its_own():
    model, q = built(Loop)
    joins = [q[f'quant_joins.add{i}'] for i in range(3)]
    a, b, c, d = model.convs
    with torch.no_grad():
        x = X + 1
        # `sum` adds the first to 0, which is no layer's alone; of the rest the layer's stays
        y = joins[0](a(x) + 0) + b(x)
        y = joins[1](y) + 2 * c(x)
        assert torch.allclose(model(X), joins[2](y) + 2 * d(x), atol=1e-6)
    readers = tuple(f'convs.{i}._input_quantizer' for i in range(4))
    assert readers in ties(model)


def test_a_place_is_found_again_after_python_has_rewritten_its_instructions():
    model, _ = built(Loop)
    with torch.no_grad():
        wanted = model(X)
        assert all(torch.equal(model(X), wanted) for _ in range(40))


class Nested(nn.Module):
    """Concats of a concat, under another mode."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([conv(), conv(8), conv(12)])

    def forward(self, x):
        y = self.convs[0](x)
        with torch.device('cpu'):
            pair = torch.cat(tensors=(x, y), dim=1)
        z = self.convs[1](pair.relu())
        both = torch.cat([pair, z], 1)
        return self.convs[2](both)


def test_concats_share_the_scale_of_their_reader():
    model, q = built(Nested)
    inner, outer = q['quant_joins.cat0'], q['quant_joins.cat1']
    with torch.no_grad():
        x, y = X, model.convs[0](X)
        pair = torch.cat([inner(x), inner(y)], 1)
        z = model.convs[1](pair.relu())
        wanted = model.convs[2](torch.cat([outer(pair), outer(z)], 1))
        assert torch.equal(model(X), wanted)
    group = {'convs.0._input_quantizer', 'convs.2._input_quantizer'}
    assert group | {'quant_joins.cat0', 'quant_joins.cat1'} in map(set, ties(model))


class Constants(nn.Module):
    """Adds that are no meeting: a parameter, a scalar, a broadcast; a weight read from outside."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.borrowed = conv(), conv(), conv()
        self.place = nn.Parameter(torch.randn(2, 4, 6, 6))

    def forward(self, x):
        y = self.used(x) + self.place + 1
        y = y + y.mean((2, 3), keepdim=True)
        return nn.functional.conv2d(self.borrowed(y), self.borrowed.weight)


def test_what_only_looks_like_a_meeting_is_none_and_odd_layers_stay_float():
    model, q = built(Constants)
    assert not any('quant_joins' in n for n in q)
    reasons = {n.partition('.')[0]: each.float_reason for n, each in q.items()}
    assert reasons['used'] is None and 'does not call it' in reasons['unused']
    assert 'something else' in reasons['borrowed']
    assert 'unused._input_quantizer._amax' not in model.state_dict()


class Pair(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.conv, self.norm, self.wrap = conv(), nn.LayerNorm([4, 6, 6]), wrap

    def forward(self, x):
        x = x.sigmoid()
        return x + self.conv(self.norm(x) if self.wrap else x)


@pytest.mark.parametrize('wrap', [False, True])
def test_a_stream_that_a_norm_reads_in_float_stays_float(wrap):
    _, q = built(Pair, wrap)
    assert ('quant_joins.add0' in q) == (not wrap)


def test_attention_keeps_the_layer_that_it_does_not_call_float():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.linear = nn.MultiheadAttention(4, 2), nn.Linear(4, 4)

        def forward(self, x):
            x = self.linear(x.flatten(2).permute(2, 0, 1))
            return self.attention(x, x, x)[0]

    torch.manual_seed(0)
    model = Attention().eval()
    with torch.no_grad():
        wanted = model(X)
        quantize(model, True, [[X]])
        assert 'attention' in model.attention.out_proj.float_reason
        with set_mode(model, 'float'):
            assert torch.equal(model(X), wanted)
    calibrate(model, [X])


def test_hooks_parametrizations_and_shared_layers_are_kept():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv()
            self.b = nn.utils.parametrizations.spectral_norm(conv())
            self.steps = [self.a, self.b, self.a]  # no child modules, but those above

        def forward(self, x):
            for step in self.steps:
                x = step(x)
            return x

    torch.manual_seed(0)
    model, seen = Shared().eval(), []
    model.a.register_forward_hook(lambda *args: seen.append(1))
    before = model.a
    wanted = model(X)
    left = quantize(model, True, [[X]]).left
    assert list(left) == ['b'] and 'computed' in left['b'] and model.a is before
    seen.clear()
    with set_mode(model, 'float'):
        assert torch.equal(model(X), wanted) and len(seen) == 2
