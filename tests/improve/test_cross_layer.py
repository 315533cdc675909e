"""Factors by channel across layers: float stays the same to the bit, and the error shrinks."""

import copy
import math

import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate, quantizers, set_mode
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.modes import uncalibrated
from mmdet3d_quant.improve import equalize_layers
from mmdet3d_quant.improve.channel_factors import exponents_of
from mmdet3d_quant.improve.moves import by_input
from mmdet3d_quant.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear
from tests.improve.models import float_outputs, same, state
from tests.improve.nets import REFUSED, SOUND, Groups, Unseen, block, data


class Chain(nn.Module):
    """``between`` lies between a batch norm and the layer that reads it."""

    def __init__(self, between, reader=None):
        super().__init__()
        torch.manual_seed(0)
        self.source, self.between = block(3, 8)[:2], between
        self.reader = reader or QuantConv2d(8, 4, 3, padding=1)
        self.eval()

    def forward(self, x):
        return self.reader(self.between(self.source(x)))


@torch.no_grad()
def uneven(model, norm, reader=None):
    """Makes channels of a norm unlike, each smaller by another power of two; a reader makes up."""
    factor = torch.tensor([1.0, 2.0**-6, 0.5, 2.0**-4, 2.0**-7, 1.0, 2.0**-5, 0.25])
    norm.weight *= factor
    norm.bias *= factor
    if reader is not None:
        reader.weight /= by_input(reader, factor)
    return model


PASSED = {
    'relu': lambda: nn.ReLU(),
    'leaky': lambda: nn.LeakyReLU(0.2),
    'prelu': lambda: nn.PReLU(8),
    'pool': lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2)),
    'resize': lambda: nn.Upsample(scale_factor=2, mode='bilinear'),
}
READERS = {
    'conv': lambda: QuantConv2d(8, 4, 3, padding=1),
    'depthwise': lambda: QuantConv2d(8, 16, 3, groups=8),
    'grouped': lambda: QuantConv2d(8, 4, 3, groups=2),
    'transposed': lambda: QuantConvTranspose2d(8, 4, 2, 2),
    'transposed grouped': lambda: QuantConvTranspose2d(8, 4, 2, 2, groups=2),
}


CASES = [('relu', reader) for reader in READERS] + [(b, 'conv') for b in PASSED if b != 'relu']


@pytest.mark.parametrize('between, reader', CASES)
def test_float_is_the_same_to_the_bit_and_the_output_is_less_wrong(between, reader):
    model = Chain(PASSED[between](), READERS[reader]())
    uneven(model, model.source[1], model.reader)
    before, plain = float_outputs(model), copy.deepcopy(model)
    (move,) = equalize_layers(model, data()).moves
    assert (move.source, move.readers[0].layer, move.readers[0].channels) == (
        'source.1',
        'reader',
        (0, 8),
    )
    assert all(torch.equal(a, b) for a, b in zip(before, float_outputs(model)))
    assert error(model, before) < error(plain, before) / 2


@torch.no_grad()
def error(model, wanted, bits=5):
    for quantizer in quantizers(model).values():
        quantizer.num_bits = bits
    model.source[0]._input_quantizer.mode = 'float'
    calibrate(model, data(), 'mse')
    for quantizer in quantizers(model.source).values():
        quantizer.mode = 'float'  # what the first layer loses is not of the channels
    return sum(float((model(x) - y).square().sum()) for x, y in zip(data(6), wanted))


@pytest.mark.parametrize('net', [*SOUND, *REFUSED])
def test_every_net_computes_the_same_to_the_bit_whatever_was_moved(net):
    model = net()
    last = [m for m in model.lidar if hasattr(m, 'weight')][-1]
    uneven(model, last)
    before = float_outputs(model)
    result = equalize_layers(model, data())
    for a, b in zip(before, float_outputs(model)):
        assert all(map(torch.equal, *(x if isinstance(x, tuple) else (x,) for x in (a, b))))
    moved = {move.source for move in result.moves}
    assert 'lidar.1' in moved or REFUSED[net] in result.left['fuser']
    if net in REFUSED and net is not Groups and 'camera.1' in moved:
        assert net.__name__ == 'Elsewhere'  # a second concat takes factors by channel, too


def test_each_channel_gets_the_power_of_two_of_the_formula():
    """sqrt(r1 / r2) of the paper, by hand; channels without values or weights stay."""
    peak, weight = [8.0, 3.0, 1.0, 0.0, 2.0], [0.5, 0.5, 4.0, 1.0, 0.0]
    found = exponents_of(torch.tensor(peak), torch.tensor(weight), 0.5).tolist()
    powers = [round(-math.log2(math.sqrt(p / w))) for p, w in zip(peak[:3], weight[:3])]
    assert found[3:] == [0, 0]
    assert [a - found[0] for a in found[:3]] == [a - powers[0] for a in powers]
    alike = exponents_of(torch.tensor(peak), torch.tensor(weight), 1.0)
    sizes = torch.tensor(peak[:3]) * alike[:3].exp2()
    assert float(sizes.max() / sizes.min()) < 2 and 8 / 2 < float(sizes.max()) < 8 * 2


def test_what_bends_elsewhere_is_refused_with_the_operator():
    for between, name in ((nn.ReLU6(), 'hardtanh'), (nn.SiLU(), 'silu'), (nn.GELU(), 'gelu')):
        model = Chain(between)
        uneven(model, model.source[1])
        before = state(model)
        result = equalize_layers(model, data())
        assert result.moves == () and name in result.left['reader'] and same(before, state(model))


def test_linear_layers_with_tokens():
    torch.manual_seed(0)
    model = nn.Sequential(QuantLinear(8, 16), nn.ReLU(), QuantLinear(16, 4)).eval()
    with torch.no_grad():
        model[0].weight[::3] *= 2.0**-6
        model[0].bias[::3] *= 2.0**-6
    tokens = [torch.randn(2, 5, 8) for _ in range(2)]
    with set_mode(model, 'float'), torch.no_grad():
        before = [model(x) for x in tokens]
        (move,) = equalize_layers(model, tokens).moves
        assert move.source == '0' and max(move.exponents[::3]) > max(move.exponents[1::3])
        assert all(torch.equal(a, model(x)) for a, x in zip(before, tokens))


def test_a_reader_that_nobody_sees_is_noticed_and_ranges_are_dropped_else():
    model = Unseen()
    uneven(model, model.camera[1])
    with pytest.raises(QuantError, match='was not seen. Nothing was changed'):
        before = state(model)
        equalize_layers(model, data())
    assert same(before, state(model))
    model = Chain(nn.ReLU())
    uneven(model, model.source[1])
    calibrate(model, data())
    equalize_layers(model, data())
    assert uncalibrated(model) == list(quantizers(model))


def test_wrong_names_and_no_batches_are_errors():
    with pytest.raises(ValueError, match="'no_such' names no quantized layer; these are: source.0"):
        equalize_layers(Chain(nn.ReLU()), data(), ['no_such'])
    with pytest.raises(ValueError, match='no batches'):
        equalize_layers(Chain(nn.ReLU()), [])
