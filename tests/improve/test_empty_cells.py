"""Values of empty cells on steps, against the float model and counts by hand."""

import copy

import pytest
import torch
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.core.unsigned import unsigned_amax
from mmdet3d_quant.improve import EmptyCells
from mmdet3d_quant.improve.empty_cells import factors
from mmdet3d_quant.layers import QuantConv2d


def row(channels=8):
    """A stage as SECOND has it, with norms that give empty cells values of their own."""
    torch.manual_seed(0)
    layers = []
    for _ in range(3):
        norm = nn.BatchNorm2d(channels)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.uniform_(norm.bias, 0.1, 0.4)
        layers += [QuantConv2d(channels, channels, 3, padding=1, bias=False), norm, nn.ReLU()]
    return nn.Sequential(*layers).eval()


class Stepped(nn.Module):
    """Calls the layers of a ``Sequential`` one by one, so that others may read between them."""

    def __init__(self):
        super().__init__()
        self.block = row()

    def forward(self, x):
        for layer in self.block:
            x = layer(x)
        return x


def maps(count=3, occupied=6):
    """Large values in a few cells, zeros in the others."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        x = torch.zeros(1, 8, 32, 32)
        at = torch.randint(0, 32, (2, occupied), generator=generator)
        x[0, :, at[0], at[1]] = 60 * torch.rand(8, occupied, generator=generator)
        found.append(x)
    return found


def calibrated(model, data, after=()):
    mq.calibrate(model, data, 'max', held_out=data[:1], after=after)
    return model


def output(model, x, mode):
    with mq.set_mode(model, mode), torch.no_grad():
        return model(x)


def test_empty_cells_are_exact_and_the_float_model_stays():
    data, step = maps(), EmptyCells()
    before = calibrated(row(), data)
    after = calibrated(copy.deepcopy(before), data, [step])
    assert set(step.changed) == {'3', '6'} and '2 inputs' in str(step)
    exact = output(before, data[2], 'float')
    assert torch.allclose(output(after, data[2], 'float'), exact, rtol=1e-4, atol=1e-4)
    errors = [(output(m, data[2], 'quant') - exact).square().mean() for m in (before, after)]
    assert errors[1] < errors[0] / 4

    inputs = {}
    for name in ('3', '6'):
        after[int(name)].register_forward_pre_hook(lambda m, a, n=name: inputs.update({n: a[0]}))
    output(after, torch.zeros(1, 8, 32, 32), 'float')
    for name, x in inputs.items():
        steps = x[0, :, 16, 16] / (after[int(name)]._input_quantizer.amax / 127)
        on_step = (steps - steps.round()).abs() < 1e-2
        assert on_step.float().mean() > 0.7 and not (steps[~on_step] > 1).any()


def test_ranges_of_weights_are_taken_anew_and_those_of_inputs_stay():
    data = maps()
    before = calibrated(row(), data)
    after = calibrated(copy.deepcopy(before), data, [EmptyCells()])
    weights = after[3].weight.detach().abs().amax((1, 2, 3))
    assert torch.equal(after[3]._weight_quantizer.amax.flatten(), weights)
    one, other = before.state_dict(), after.state_dict()
    changed = {k for k in one if not torch.equal(one[k], other[k])}
    moved = {f'{i}.{k}' for i in (1, 4) for k in ('weight', 'bias')}
    moved |= {f'{i}.{k}' for i in (3, 6) for k in ('weight', '_weight_quantizer._amax')}
    assert changed == moved


def test_steps_of_uint8_have_the_values_too():
    after = calibrated(row(), maps(), [EmptyCells()])
    for name in (3, 6):
        quantizer = after[name]._input_quantizer
        steps = (quantizer.amax / 127) / (unsigned_amax(quantizer) / 255)
        assert float(steps) == pytest.approx(2, abs=1e-6)
        assert unsigned_amax(quantizer) >= quantizer.amax


def dense():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, 8, 32, 32, generator=generator) for _ in range(3)]


def fp8():
    model = row()
    for quantizer in mq.quantizers(model).values():
        quantizer.num_bits = (4, 3)
    return model


@pytest.mark.parametrize(
    'make, data', [(row, dense), (Stepped, maps), (fp8, maps)], ids=['dense', 'stepped', 'fp8']
)
def test_what_is_not_known_to_be_safe_stays(make, data):
    model, step = make(), EmptyCells()
    before = copy.deepcopy({k: v for k, v in model.state_dict().items() if 'amax' not in k})
    calibrated(model, data(), [step])
    assert step.changed == {}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_factors_by_hand():
    """Steps of 1; channels: 2.4 almost everywhere, 0.2 with room, 0.2 without, 0, and no value."""
    x = torch.zeros(1, 5, 10, 10)
    x[0, 0], x[0, 1], x[0, 2] = 2.4, 0.2, 0.2
    x[0, 4] = torch.arange(100).reshape(10, 10)
    x[0, :3, 0, 0] = torch.tensor([100.0, 10.0, 100.0])
    quantizer = QuantConv2d(5, 1, 1)._input_quantizer
    quantizer.amax = 127.0
    factor, error = factors(x, quantizer)
    assert torch.allclose(factor, torch.tensor([2 / 2.4, 5, 1, 1, 1]))
    assert error == pytest.approx((0.4 + 0.2 + 0.2) / 3, abs=1e-5)
    assert factors(x[:, 2:], quantizer) is None


def test_a_batch_is_needed():
    with pytest.raises(ValueError, match='held-out batch'):
        mq.calibrate(row(), maps(), held_out=[], after=[EmptyCells()])
