"""Peaks by channel and batch, against the tensors themselves; merging in any order."""

import numpy as np
import pytest
import torch
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.calibration.peaks import Peaks, channel_peaks
from mmdet3d_quant.core.formats import INT8
from mmdet3d_quant.layers import QuantConcat, QuantConv2d, QuantLinear


@pytest.mark.parametrize(
    'shape, axis', [((2, 5, 3, 4), 1), ((7, 5), 1), ((2, 9, 5), -1), ((2, 5, 3, 4, 6), 1)]
)
@pytest.mark.parametrize('layout', ['plain', 'moved', 'half'])
def test_channel_peaks_are_those_of_the_tensor(shape, axis, layout):
    torch.manual_seed(0)
    x = torch.randn(shape)
    if layout == 'moved':
        x = x.transpose(-1, 0).contiguous().transpose(-1, 0)
    x = x.half() if layout == 'half' else x
    expected = np.abs(np.moveaxis(x.float().numpy(), axis, 0)).reshape(5, -1).max(1)
    assert np.array_equal(channel_peaks(x, axis).numpy(), expected)


def test_odd_tensors_have_peaks():
    assert channel_peaks(torch.tensor(-3.0), 1).tolist() == [3.0]
    assert channel_peaks(torch.tensor([-3.0, 2.0]), 1).tolist() == [3.0]
    assert channel_peaks(torch.zeros(0, 4), 1).numel() == 0


def peaks(batch, *tensors):
    result = Peaks()
    for t in tensors:
        result.add(t, 1)
    result.number(batch)
    return result


def test_merging_is_exact_in_any_order_and_survives_saving():
    torch.manual_seed(0)
    parts = [peaks(n, torch.randn(3, 4), torch.randn(3, n + 1)) for n in range(4)]
    total, back = Peaks(), Peaks()
    for a, b in zip(parts, reversed(parts)):
        total, back = total.merge(a), b.merge(back)
    again = Peaks.of_state(total.state_dict())
    for other in (back, again):
        assert all(map(torch.equal, other.channels, total.channels))
        assert other.by_batch.keys() == total.by_batch.keys() and other.batch == total.batch
    assert [len(p) for p in total.channels] == [4, 4]
    top = max(range(4), key=lambda n: max(float(p.max()) for p in parts[n].channels))
    assert total.batch == top and Peaks().batch is None


def test_bits_are_those_of_the_largest_integer():
    assert [INT8.bits_used(p) for p in (0.4, 1.0, 3.0, 7.0, 127.0)] == [0, 2, 3, 4, 8]


def test_a_frame_with_an_outlier_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(QuantConv2d(3, 4, 1))
    batches = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    batches[2][0, 1, 2, 3] = -3e4
    (result,) = mq.calibrate(model, batches).ranges
    assert result.largest_in == 2 and result.largest == 3e4
    assert 'unsteady' in result.health.flags and result.health.lost > 0.9
    (steady,) = mq.calibrate(model, batches[:2]).ranges
    assert not steady.health.flags


def test_a_small_branch_of_a_concat_is_told():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.concat = QuantConcat()

        def forward(self, x):
            return self.concat([x, x * self.share])

    torch.manual_seed(0)
    model, x = Net(), torch.randn(1, 4, 32, 32)
    model.share = 0.01
    (told,) = mq.calibrate(model, [x], method='max').ranges
    assert told.health.flags == ('narrow',)
    assert told.health.bits == (
        8.0,
        INT8.bits_used(0.01 * float(x.abs().max()) / (told.amax / 127)),
    )
    model.share = 0.3
    (told,) = mq.calibrate(model, [x], method='max').ranges
    assert told.health.flags == () and min(told.health.bits) > 6


@pytest.mark.parametrize('layer, axis', [(QuantConv2d(10, 4, 1), 1), (QuantLinear(10, 4), -1)])
def test_channels_of_other_units_are_told(layer, axis):
    torch.manual_seed(0)
    x = torch.randn(500, 10) * torch.tensor([50.0] * 5 + [0.02] * 5)  # metres, and offsets
    x = x if axis == -1 else x.T[None, :, :, None]
    (told,) = mq.calibrate(nn.Sequential(layer), [x], method='max').ranges
    assert told.health.flags == ('channels',) and told.health.lost_channels == 0.5


@pytest.mark.parametrize('small', [0, 1])
def test_a_small_branch_is_told_behind_the_concat_too(small):
    """As a fuser has it: joined first, then quantized as one tensor by the convolution."""

    class Fuser(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = QuantConv2d(12, 4, 1)

        def forward(self, x):
            maps = [x[:, :4], x[:, 4:]]
            maps[small] = maps[small] * self.share
            return self.conv(torch.cat(maps, dim=1))

    torch.manual_seed(0)
    model, x = Fuser(), torch.randn(2, 12, 32, 32)
    model.share = 0.01
    (told,) = mq.calibrate(model, [x], method='max').ranges
    assert told.health.flags == ('narrow',)
    assert told.health.bits[small] < 3 and told.health.bits[1 - small] == 8
    model.share = 0.3
    (told,) = mq.calibrate(model, [x], method='max').ranges
    assert told.health.flags == () and len(told.health.bits) == 2
