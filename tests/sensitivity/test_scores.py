"""Scores against brute force: each unit quantized by itself, and the true error of the maps."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import mmdet3d_quant as mq
from mmdet3d_quant.core.ties import ties
from mmdet3d_quant.sensitivity.measure import Bench
from mmdet3d_quant.sensitivity.rows import predicted_noise
from mmdet3d_quant.sensitivity.units import find_members, find_units
from tests.sensitivity.toy import Blobs, batch_of, toy

FRAMES = 3


def brute(model, unit):
    """Error of the head's input over its square, by copies of the model alone."""
    images = torch.stack([Blobs()[frame]['inputs'] for frame in range(FRAMES)])
    maps = []
    for quantized in (False, True):
        one = copy.deepcopy(model)
        for name, quantizer in mq.quantizers(one).items():
            inside = any(name == m or name.startswith(f'{m}.') for m in unit.members)
            quantizer.mode = 'quant' if quantized and inside else 'float'
        with torch.no_grad():
            maps.append(one.backbone(images).double())
    dims = (1, 2, 3)
    return ((maps[1] - maps[0]).square().sum(dims) / maps[0].square().sum(dims)).mean().item()


def predicted(bench, units, probes=4):
    found = [bench.predict(frame, probes)['products'] for frame in range(FRAMES)]
    return [predicted_noise(unit, found) for unit in units]


@pytest.mark.parametrize('bits', [4, 6])
def test_prediction_ranks_as_brute_force(bits):
    model = toy(bits)
    units, bench = find_units(model), Bench(model, batch_of)
    exact = [brute(model, unit) for unit in units]
    guess = predicted(bench, units, probes=8)
    assert spearmanr(exact, guess)[0] >= 0.8
    ratios = np.log10(np.divide(guess, exact))
    assert abs(np.median(ratios)) < 0.15  # no factor is forgotten
    assert [bench.noise(u.members, [0, 1, 2]) for u in units] == pytest.approx(exact, rel=1e-4)


def test_prediction_of_a_linear_layer_is_exact_in_the_mean():
    """Behind the last layer there is nothing: the noise is its own error."""
    model = toy(4)
    unit = next(u for u in find_units(model) if 'backbone.last' in u.members)
    guess = predicted(Bench(model, batch_of), [unit], probes=400)[0]
    assert guess == pytest.approx(brute(model, unit), rel=0.1)


def test_a_spoilt_layer_comes_first():
    for name in ('backbone.blocks.2.conv2', 'backbone.stem'):
        model = toy(outlier=name)
        units, bench = find_units(model), Bench(model, batch_of)
        guess = predicted(bench, units)
        worst = units[int(np.argmax(guess))]
        assert name in worst.members
        others = [n for u, n in zip(units, guess) if u is not worst]
        assert max(guess) > 10 * max(others)


def test_the_model_is_left_as_it_was():
    model = toy()
    before = copy.deepcopy(model.state_dict())
    switches = {n: q.switches for n, q in mq.quantizers(model).items()}
    bench = Bench(model, batch_of)
    bench.predict(0, 2)
    bench.sizes(0)
    bench.state(list(bench.members)[:3], [0])
    assert {n: q.switches for n, q in mq.quantizers(model).items()} == switches
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize('level', ['layer', 'block', 'part'])
def test_units_share_no_scale_and_miss_nothing(level):
    model = toy()
    units, members = find_units(model, level), find_members(model)
    assert sorted(n for u in units for n in u.members) == sorted(members)
    for group in ties(model):
        owners = {u.name for u in units for n in u.members if set(members[n]) & set(group)}
        assert len(owners) == 1
    assert len({u.name for u in units}) == len(units)


def test_blocks_and_parts_are_the_modules():
    model = toy(quantized_head=True)
    blocks = [u.name for u in find_units(model, 'block')]
    assert blocks == [
        'backbone.stem',
        *(f'backbone.blocks.{i}' for i in range(4)),
        'backbone.left +1',
        'backbone.join +1',
        'bbox_head.conv',
    ]
    assert [u.name for u in find_units(model, 'part')] == ['backbone', 'bbox_head.conv']


def test_a_quantized_head_is_judged_by_what_it_makes():
    model = toy(4, quantized_head=True)
    units, bench = find_units(model), Bench(model, batch_of)
    guess = dict(zip((u.name for u in units), predicted(bench, units)))
    assert guess['bbox_head.conv'] > 0
    assert bench.noise(['bbox_head.conv'], [0]) > 0


def test_sources_and_sizes_are_those_of_the_forward():
    model = toy()
    bench = Bench(model, batch_of)
    sources, sizes = bench.predict(0, 1)['sources'], bench.sizes(0)
    assert sources['backbone.stem'] == []
    assert sources['backbone.blocks.0.conv1'] == ['backbone.stem']
    assert sources['backbone.last'] == ['backbone.join._input_quantizer']
    assert sources['backbone.join._input_quantizer'] == ['backbone.left', 'backbone.right']
    assert set(sources['backbone.left']) == {'backbone.blocks.3.add._input_quantizer'}
    assert sizes['backbone.last'] == dict(
        macs=8 * 12 * 9 * 576, weights=8 * 12 * 9 + 8, reads=12 * 576, writes=8 * 576
    )
    assert sizes['backbone.join._input_quantizer']['reads'] == 12 * 576


def test_no_noise_of_a_model_in_float():
    bench = Bench(toy(), batch_of)
    assert bench.noise([], [0]) == 0
    assert bench.state([], [0, 1, 2])['map'] == pytest.approx(100, abs=1)
    assert math.isfinite(bench.noise(list(bench.members), [0]))
