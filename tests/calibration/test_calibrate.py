"""Calibration: ranges from data, merged over ties, all or nothing."""

import copy

import pytest
import torch
from torch import nn

from mmdet3d_quant import CalibrationError, calibrate, quantizers
from mmdet3d_quant.calibration.histogram import NonFiniteError
from mmdet3d_quant.core.known import KnownRange
from mmdet3d_quant.layers import QuantConcat, QuantConv2d, QuantConvTranspose2d, QuantLinear


class Tied(nn.Module):
    """Two convolutions on one grid, one of them reading a tensor ten times larger."""

    def __init__(self):
        super().__init__()
        self.a = QuantConv2d(2, 2, 1)
        self.b = QuantConv2d(2, 2, 1)

    def quant_ties(self):
        return [['a._input_quantizer', 'b._input_quantizer']]

    def forward(self, x):
        return self.a(x) + self.b(x * 10)


def batches(n=3, channels=2):
    torch.manual_seed(0)
    return [torch.randn(2, channels, 8, 8) for _ in range(n)]


def test_max_is_the_largest_value_of_the_batches_used():
    model = nn.Sequential(QuantConv2d(2, 3, 1), QuantConv2d(3, 2, 1))
    data = batches()
    data.append(torch.full((1, 2, 8, 8), 1000.0))
    result = calibrate(model, data, 'max', num_batches=3)
    assert result.num_batches == 3
    assert float(model[0]._input_quantizer.amax) == float(torch.cat(data[:3]).abs().max())
    with torch.no_grad():
        hidden = [nn.functional.conv2d(x, model[0].weight, model[0].bias) for x in data[:3]]
    assert float(model[1]._input_quantizer.amax) == float(torch.cat(hidden).abs().max())


@pytest.mark.parametrize(
    'layer, dims',
    [
        (QuantConv2d(4, 6, 3), (1, 2, 3)),
        (QuantConvTranspose2d(4, 6, 2), (0, 2, 3)),
        (QuantLinear(4, 6), (1,)),
    ],
)
def test_weights_get_one_range_per_output_channel(layer, dims):
    x = torch.randn(3, 4) if isinstance(layer, QuantLinear) else torch.randn(3, 4, 5, 5)
    calibrate(layer, [x])
    amax = layer._weight_quantizer.amax
    assert amax.numel() == 6
    assert torch.equal(amax, layer.weight.detach().abs().amax(dims, keepdim=True))


@pytest.mark.parametrize('method', ['max', 'percentile:99', 'entropy', 'mse'])
def test_tied_quantizers_get_one_range_from_all_their_data(method):
    model, data = Tied(), batches()
    result = calibrate(model, data, method)
    a, b = model.a._input_quantizer, model.b._input_quantizer
    assert torch.equal(a.amax, b.amax) and a._amax is not b._amax
    assert result.ranges[0].group == result.ranges[1].group == 0
    alone = QuantConv2d(2, 2, 1)
    together = [torch.cat([x, x * 10]) for x in data]
    calibrate(alone, together, method)
    assert torch.equal(alone._input_quantizer.amax, a.amax)


def test_concat_inputs_share_one_range():
    concat = QuantConcat()
    small, large = torch.randn(1, 2, 4, 4), torch.randn(1, 3, 4, 4) * 50
    calibrate(concat, [[[small, large]]], 'max')
    assert float(concat._input_quantizer.amax) == float(large.abs().max())
    assert concat([small, large, small]).shape[1] == 7


def test_training_flags_and_weights_are_left_alone():
    model = nn.Sequential(QuantConv2d(2, 2, 1), nn.BatchNorm2d(2))
    model.train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items() if '_amax' not in k}
    calibrate(model, batches())
    assert model.training and model[0].training and not model[1].training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert {q.mode for q in quantizers(model).values()} == {'quant'}


def untouched(model):
    return not any(q.calibrated for q in quantizers(model).values()) and all(
        q._calibrator is None and q.mode == 'quant' for q in quantizers(model).values()
    )


def test_nan_in_the_data_names_the_first_layer_and_changes_nothing():
    model = nn.Sequential(QuantConv2d(2, 2, 1), QuantConv2d(2, 2, 1))
    data = batches()
    data[1][0, 0, 0, 0] = float('nan')
    with pytest.raises(NonFiniteError, match='0._input_quantizer is the first'):
        calibrate(model, data)
    assert untouched(model)


def test_no_batches_unreached_layers_and_float_models_are_errors():
    model = nn.Sequential(QuantConv2d(2, 2, 1))
    with pytest.raises(CalibrationError, match='no batches'):
        calibrate(model, [])
    model.add_module('unused', QuantConv2d(2, 2, 1))
    with pytest.raises(CalibrationError, match='unused._input_quantizer'):
        calibrate(model, batches(), forward=lambda m, x: m[0](x))
    assert untouched(model)
    with pytest.raises(ValueError, match='no quantized layers'):
        calibrate(nn.Conv2d(2, 2, 1), batches())
    with pytest.raises(ValueError, match='num_batches'):
        calibrate(model, batches(), num_batches=0)
    with pytest.raises(ValueError, match='unknown calibration method'):
        calibrate(model, batches(), method='no_such_method')


def test_a_step_after_the_ranges_sees_them_and_changes_the_model():
    model = nn.Sequential(QuantConv2d(2, 3, 1), QuantConv2d(3, 2, 1))
    data, seen = batches(), []

    def shift(model, choices, held_out):
        seen.append(({n: c.amax for c in choices for n in c.unit.names}, held_out))
        assert all(q.mode == 'quant' and q.calibrated for q in quantizers(model).values())
        with torch.no_grad():
            model[1].bias += 1

    before = model[1].bias.detach().clone()
    result = calibrate(model, data, 'max', after=[shift])
    assert torch.equal(model[1].bias, before + 1)
    ((ranges, held_out),) = seen
    assert ranges == {r.name: r.amax for r in result.ranges}
    assert [batch is data[-1] for _, batch in held_out] == [True] and result.num_batches == 2


def test_a_step_that_fails_leaves_weights_ranges_and_modes_as_they_were():
    model = nn.Sequential(QuantConv2d(2, 3, 1), nn.BatchNorm2d(3), QuantConv2d(3, 2, 1))
    calibrate(model, batches(), 'max')
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def fail(model, choices, held_out):
        with torch.no_grad():
            model[0].weight.mul_(2)
            model[1].running_mean.add_(1)
        raise RuntimeError('no way')

    with pytest.raises(RuntimeError, match='no way'):
        calibrate(model, [10 * x for x in batches()], 'mse', after=[fail])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(q.mode == 'quant' and q.calibrated for q in quantizers(model).values())


@pytest.mark.usefixtures('same_optimizers')
@pytest.mark.parametrize('part', ['whole', 'inside', 'in place'])
def test_a_compiled_model_is_calibrated_like_the_plain_one(part):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Sequential(QuantConv2d(3, 4, 1), nn.ReLU()), QuantConv2d(4, 2, 1))
    batches = [torch.randn(1, 3, 8, 8) for _ in range(3)]
    model = copy.deepcopy(plain).eval()
    if part == 'whole':
        model = torch.compile(model, backend='eager')
    elif part == 'inside':
        model[0] = torch.compile(model[0], backend='eager')
    else:
        if not hasattr(model, 'compile'):
            pytest.skip('torch 2.2 has Module.compile')
        model[0].compile(backend='eager')
    for method in ('mse', 'auto'):
        expected = calibrate(copy.deepcopy(plain).eval(), batches, method)
        found = calibrate(model, batches, method)
        assert [r.amax for r in found.ranges] == [r.amax for r in expected.ranges]


@pytest.mark.parametrize('method', ['max', 'mse', 'auto'])
def test_a_known_range_is_taken_whatever_the_data_unless_the_plan_names_it(method):
    ranges, told = [], []
    for peak in (1.0, 500.0):
        model = Tied()
        model.b._input_quantizer.known = KnownRange(12.0, 'physics')
        data = batches(4)
        data[0][0, 0, 0, 0] = peak
        result = calibrate(model, data, method)
        ranges.append([float(q.amax) for q in (model.a._input_quantizer, model.b._input_quantizer)])
        told.append([r.method for r in result.ranges])
        named = calibrate(model, data, {'': 'max', 'b': 'max'}, num_batches=4)
        assert float(model.b._input_quantizer.amax) == float((10 * torch.cat(data)).abs().max())
        assert [r.method for r in named.ranges] == ['max'] * 2
    assert ranges == [[12.0, 12.0]] * 2  # of the tie group, too
    assert told == [['known: physics'] * 2] * 2
