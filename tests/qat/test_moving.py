"""Ranges that follow weights, and learned ones, against what the mathematics says."""

import copy
import math

import pytest
import torch

import mmdet3d_quant as mq
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.fake_quant import fake_quantize
from mmdet3d_quant.models import QuantResNet
from mmdet3d_quant.qat import LearnedRanges, WeightRanges
from tests.qat.toy import Points, Toy


def calibrated_toy(**kwargs):
    torch.manual_seed(0)
    model = Toy(**kwargs)
    mq.calibrate(model, [Points().images])
    return model


def test_weight_ranges_keep_their_share_of_the_largest_weight():
    model = calibrated_toy()
    quantizer = model.a._weight_quantizer
    quantizer.amax = quantizer.amax * torch.tensor([1.0, 0.5, 0.9, 1.0]).view(-1, 1, 1, 1)
    ranges = WeightRanges(model)
    ranges.follow()
    before = quantizer.amax.clone()
    with torch.no_grad():
        model.a.weight.mul_(torch.tensor([2.0, 3.0, 0.25, -1.0]).view(-1, 1, 1, 1))
    ranges.follow()
    factor = torch.tensor([2.0, 3.0, 0.25, 1.0]).view(-1, 1, 1, 1)
    assert torch.allclose(quantizer.amax, before * factor)
    # A later run with the saved shares sets the very same ranges.
    again = WeightRanges(model, ranges.ratios)
    kept = quantizer.amax.clone()
    again.follow()
    assert torch.equal(quantizer.amax, kept)


def weight_gradient(layer):
    """Of the sum of the rounded weight: 1 where it passes."""
    layer.weight.grad = None
    layer._weight_quantizer(layer.weight).sum().backward()
    return layer.weight.grad


def kept_for_backward(layer):
    """Tensors that rounding the weight keeps."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        layer._weight_quantizer(layer.weight)
    return kept


def test_weights_known_to_be_inside_need_no_mask():
    """The mask is made from the weight and its range; without it, none is kept for the backward."""
    model = calibrated_toy()
    layer, ranges = model.a, WeightRanges(model)
    assert kept_for_backward(layer)
    ranges.follow()
    assert not kept_for_backward(layer) and (weight_gradient(layer) == 1).all()
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = 100.0  # by hand, so that nothing is known any more
    assert kept_for_backward(layer) and weight_gradient(layer)[0, 0, 0, 0] == 0
    ranges.follow()
    assert not kept_for_backward(layer) and (weight_gradient(layer) == 1).all()
    layer._weight_quantizer.amax = layer._weight_quantizer.amax / 2
    inside = layer.weight.detach().abs() <= layer._weight_quantizer.amax
    assert weight_gradient(layer).bool().equal(inside) and not inside.all()


def test_a_copy_knows_nothing_of_what_was_inside():
    model = calibrated_toy()
    WeightRanges(model).follow()
    changed = copy.deepcopy(model.state_dict())
    changed['a._weight_quantizer._amax'] *= 0.3
    layer = copy.deepcopy(model).a
    layer.load_state_dict({n[2:]: t for n, t in changed.items() if n.startswith('a.')})
    inside = layer.weight.detach().abs() <= layer._weight_quantizer.amax
    assert weight_gradient(layer).bool().equal(inside) and not inside.all()
    layer = model.a
    layer._weight_quantizer._amax = layer._weight_quantizer._amax * 0.3  # another tensor
    assert not weight_gradient(layer).all()


def test_ranges_below_the_largest_weight_keep_the_mask():
    model = calibrated_toy()
    layer = model.a
    layer._weight_quantizer.amax = layer._weight_quantizer.amax * 0.7
    WeightRanges(model).follow()
    inside = layer.weight.detach().abs() <= layer._weight_quantizer.amax
    assert weight_gradient(layer).bool().equal(inside) and not inside.all()


def test_a_dead_channel_that_wakes_gets_a_range():
    model = calibrated_toy()
    with torch.no_grad():
        model.a.weight[0] = 0
    model.a._weight_quantizer.amax = model.a.weight_amax()
    ranges = WeightRanges(model)
    with torch.no_grad():
        model.a.weight[0, 0, 0, 0] = -0.3
    ranges.follow()
    assert model.a._weight_quantizer.amax[0].item() == pytest.approx(0.3)


def test_one_learned_range_per_group_takes_the_gradient_of_all_its_readers():
    """Against a model in which the group really is one tensor."""
    model = calibrated_toy(learn_amax=True)
    learned = LearnedRanges(model)
    assert len(learned) == 3  # a and b together, the concat, the head
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    learned.attach(optimizer)
    x = Points().images
    a, b = model.a._input_quantizer, model.b._input_quantizer
    before = a.amax.clone()

    shared = before.clone().requires_grad_()
    weights = {
        name: getattr(model, name)._weight_quantizer(getattr(model, name).weight).detach()
        for name in ('a', 'b')
    }
    inputs = fake_quantize(x, shared, a.spec), fake_quantize(x, shared, b.spec)
    one = torch.nn.functional.conv2d(inputs[0], weights['a'], model.a.bias, padding=1)
    two = torch.nn.functional.conv2d(inputs[1], weights['b'], model.b.bias)
    (one.square().sum() + two.sum()).backward()

    (model.a(x).square().sum() + model.b(x).sum()).backward()
    optimizer.step()
    wanted = before * torch.exp(-shared.grad * before)
    assert torch.allclose(a.amax, wanted, rtol=1e-4)
    assert torch.equal(a.amax, b.amax) and not torch.equal(a.amax, before)
    assert model.head._input_quantizer.amax > 0  # untouched: it had no gradient


def test_a_frozen_member_moves_with_its_group_at_the_rate_of_the_others():
    """Optimizers keep frozen parameters, with other settings."""
    model = calibrated_toy(learn_amax=True)
    first, second = model.a._input_quantizer, model.b._input_quantizer
    first._amax.requires_grad_(False)
    learned = LearnedRanges(model)
    groups = [dict(params=[first._amax], lr=1e-9), dict(params=[second._amax], lr=0.1)]
    optimizer = torch.optim.Adam(groups, eps=1e-15)
    learned.attach(optimizer)
    before = first.amax.clone()
    model(Points().images).square().sum().backward()
    optimizer.step()
    assert torch.equal(first.amax, second.amax)
    assert abs(math.log(first.amax / before)) == pytest.approx(0.1, rel=1e-3)


def test_frozen_stages_do_not_learn_ranges_from_the_start():
    """DDP counts on the gradients of all parameters that want one when it is made."""
    model = QuantResNet(depth=18, base_channels=4, frozen_stages=1, learn_amax=True)
    wants = {n: p.requires_grad for n, p in model.named_parameters() if n.endswith('_amax')}
    model.train()
    assert wants == {n: p.requires_grad for n, p in model.named_parameters() if n in wants}
    assert wants['layer2.0.conv1._input_quantizer._amax']
    assert not wants['layer1.0.conv1._input_quantizer._amax']


def test_a_step_of_adam_changes_every_range_by_the_same_share():
    model = calibrated_toy(learn_amax=True)
    model.head._input_quantizer.amax = 100.0
    learned = LearnedRanges(model)
    ranges = [q for q in mq.quantizers(model).values() if q.learned]
    optimizer = torch.optim.Adam([q._amax for q in ranges], lr=0.1, eps=1e-15)
    learned.attach(optimizer)
    before = [q.amax.clone() for q in ranges]
    model(Points().images).square().sum().backward()
    optimizer.step()
    shares = [abs(math.log(q.amax / was)) for q, was in strict_zip(ranges, before)]
    assert shares == pytest.approx([0.1] * len(ranges), rel=1e-3)


def test_learning_finds_a_range_that_was_sixteen_times_too_wide():
    torch.manual_seed(0)
    model = calibrated_toy(learn_amax=True)
    found = mq.quantizers(model)
    good = {n: q.amax.item() for n, q in found.items() if q.learned}
    for name in good:
        found[name].amax = good[name] * 16
    learned = LearnedRanges(model)
    optimizer = torch.optim.Adam([found[n]._amax for n in good], lr=0.05)
    learned.attach(optimizer)
    x = Points().images
    with mq.set_mode(model, 'float'), torch.no_grad():
        model.eval()
        wanted = model(x)

    def error():
        return (model(x) - wanted).square().mean()

    start = error().item()
    for _ in range(80):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < start / 5
    assert all(found[n].amax.item() < 6 * good[n] for n in good)


def test_a_group_learned_in_part_is_an_error():
    model = calibrated_toy()
    model.a._input_quantizer.learn()
    with pytest.raises(ValueError, match='not that of b._input_quantizer'):
        LearnedRanges(model)


def test_learning_changes_no_key_and_no_value():
    model, learning = Toy(), Toy(learn_amax=True)
    assert model.state_dict().keys() == learning.state_dict().keys()
    learning.load_state_dict(calibrated_toy().state_dict())
    x = Points().images
    assert torch.equal(learning.eval()(x), calibrated_toy().eval()(x))
    assert not mq.quantizers(learning)['a._weight_quantizer'].learned
    assert {n for n, _ in learning.named_parameters() if '_amax' in n} == {
        f'{n}._input_quantizer._amax' for n in ('a', 'b', 'join', 'head')
    }
