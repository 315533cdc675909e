"""What people bring to calibration: forwards that change their batch, masks, casts, mix-ups."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.calibration.histogram import NonFiniteError
from mmdet3d_quant.layers import QuantConv2d

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(QuantConv2d(3, 4, 3, bias=False), norm, nn.ReLU(), QuantConv2d(4, 2, 1))


def ranges(model):
    return [float(model[i]._input_quantizer.amax) for i in (0, 3)]


def test_a_forward_may_scale_its_batch_in_place():
    model, expected = small(), small()
    calibrate(model, [X.clone()], 'max', forward=lambda m, batch: m(batch.mul_(10)))
    calibrate(expected, [X * 10], 'max')
    assert ranges(model) == ranges(expected)
    assert ranges(model)[0] == float((X * 10).abs().max())


def test_a_forward_may_take_things_out_of_its_batch():
    model = small()
    history = (X.clone().requires_grad_() * 1).relu()  # no leaf, as a feature of a teacher
    batch = dict(img=X, other=[history])
    calibrate(model, [batch], 'max', forward=lambda m, batch: m(batch.pop('img')))
    assert ranges(model)[0] == float(X.abs().max())


def test_minus_infinity_masks_and_other_infinities_are_damage():
    model = small()
    model.register_buffer('mask', torch.full((3, 3), -math.inf).triu(1))
    calibrate(model, [X])
    for name, value in (('mask', math.nan), ('mask', math.inf), ('0.weight', -math.inf)):
        broken = small()
        broken.register_buffer('mask', torch.zeros(1))
        with torch.no_grad():
            broken.state_dict()[name].view(-1)[0] = value
        with pytest.raises(NonFiniteError, match=name):
            calibrate(broken, [X])


@pytest.mark.parametrize('scale', [1e-9, 1.0, 1e6])
@pytest.mark.parametrize('learned', [False, True])
def test_ranges_keep_their_numbers_when_a_model_is_cast_to_half(scale, learned):
    model = small()
    calibrate(model, [X * scale], 'max')
    if learned:
        model[0]._input_quantizer.learn()
    before = ranges(model)
    model.half()
    assert model[0].weight.dtype == torch.float16
    assert ranges(model) == before
    model.bfloat16().double().float()
    assert ranges(model) == before


@pytest.mark.parametrize(
    ('batches', 'arguments', 'error', 'message'),
    [
        (X, {}, ValueError, r'\[batch\]'),
        (dict(img=X), {}, ValueError, r'\[batch\]'),
        ([X.numpy()], {}, TypeError, 'ndarray.*forward'),
        ([np.array('img.png')], {}, TypeError, 'ndarray.*forward'),
        (['img.png'], {}, TypeError, 'str.*forward'),
        ([X], dict(method='auto'), ValueError, 'at least 2 batches'),
        ([X], dict(method='percentile:0.9999'), ValueError, 'percentile:99.99'),
    ],
)
def test_what_cannot_be_meant_is_told(batches, arguments, error, message):
    with pytest.raises(error, match=message):
        calibrate(small(), batches, **arguments)
