"""Equalized concats: the float model stays the same to the bit, and small branches get levels."""

import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate, set_mode
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.modes import quantizers, uncalibrated
from mmdet3d_quant.improve import equalize_concats
from mmdet3d_quant.layers import QuantConv2d
from tests.improve.models import float_outputs, same, state
from tests.improve.nets import REFUSED, SOUND, Added, Fusion, Unseen, block, data, shrink


@pytest.mark.parametrize('factor', [2.0**-7, 0.01])
@pytest.mark.parametrize('net', SOUND)
def test_a_small_branch_is_scaled_and_the_float_model_is_the_same_to_the_bit(net, factor):
    model = shrink(net(), factor)
    before = float_outputs(model)
    result = equalize_concats(model, data())
    assert [(m.branch, m.concat) for m in result.moves] == [(0, result.moves[0].concat)]
    assert result.moves[0].exponent in (6, 7, 8)
    assert not any(left.refused for left in result.left)
    assert all(torch.equal(a, b) for a, b in zip(before, float_outputs(model)))
    weights = state(model)
    assert equalize_concats(model, data(6)).moves == () and same(weights, state(model))


def test_a_power_of_two_is_undone_to_the_bit_and_a_balanced_net_is_left_alone():
    sound = Fusion()
    calibrate(sound, data())
    before = state(sound)
    result = equalize_concats(sound, data())
    assert (result.moves, result.left, result.num_concats) == ((), (), 1)
    assert same(before, state(sound)) and not uncalibrated(sound)
    damaged = shrink(Fusion(), 2.0**-7)
    assert not same(before, state(damaged))
    equalize_concats(damaged, data())
    assert same(before, state(damaged))


@torch.no_grad()
def sqnr(model):
    """Of the first branch as the fuser reads it, and of the model's output, dB."""
    calibrate(model, data())
    read = model.fuser._input_quantizer
    branch = torch.cat([model.camera(x) for x in data()]).double()
    error = torch.cat([read(model.camera(x)) for x in data()]).double() - branch
    made = torch.cat([model(x) for x in data()]).double()
    with set_mode(model, 'float'):
        # What the branch's own layers lose is not the concat's.
        floats = torch.cat([model(x) for x in data()]).double()
    return [
        float(10 * (a.square().sum() / b.square().sum()).log10())
        for a, b in ((branch, error), (floats, made - floats))
    ]


def test_the_branch_and_the_output_are_as_good_as_without_the_defect():
    (branch, output), (lost_branch, lost_output) = sqnr(Fusion()), sqnr(shrink(Fusion(), 0.01))
    assert lost_branch < branch - 30 and lost_output < output - 10
    model = shrink(Fusion(), 0.01)
    equalize_concats(model, data())
    cured = sqnr(model)
    assert cured[0] > branch - 1 and cured[1] > output - 1


@pytest.mark.parametrize('net', REFUSED)
def test_what_cannot_be_scaled_is_refused_with_the_layer_and_the_reason(net):
    model = shrink(net(), 0.01)
    if model.lidar is not model.camera:
        model.lidar[1].register_forward_hook(lambda module, x, y: y)  # it is fixed, too
    before = state(model)
    result = equalize_concats(model, data())
    assert result.moves == () and same(before, state(model))
    (left,) = (k for k in result.left if k.branch == 0 and k.concat == type(model).__name__)
    assert left.refused and left.bits > 4 and REFUSED[net] in left.reason, left


def test_where_the_small_branch_is_fixed_the_large_one_is_scaled_down():
    model = shrink(Added(), 0.01)
    before = float_outputs(model)
    result = equalize_concats(model, data())
    (move,) = result.moves
    assert (move.branch, move.source) == (1, 'lidar.1') and move.exponent < -4
    assert all(torch.equal(a, b) for a, b in zip(before, float_outputs(model)))


def test_weights_that_would_lose_as_much_take_half():
    """A branch that is small and matters little: its weights are as large as the others."""
    model = Fusion()
    with torch.no_grad():
        for tensor in (model.camera[1].weight, model.camera[1].bias):
            tensor.mul_(2.0**-8)
    (move,) = equalize_concats(model, data()).moves
    assert move.exponent in (3, 4, 5)
    model = shrink(Fusion(), 2.0**-8)
    model.fuser._weight_quantizer.keep_float('weights that are not rounded lose nothing')
    with torch.no_grad():
        model.fuser.weight[:, :8].div_(2.0**8)
    (move,) = equalize_concats(model, data()).moves
    assert move.exponent in (7, 8, 9)
    model = shrink(Added(), 0.01)
    model.fuser._weight_quantizer.keep_float('here, too, where the other branch is made smaller')
    (move,) = equalize_concats(model, data()).moves
    assert move.branch == 1 and move.exponent in (-6, -7, -8)


def test_a_reader_that_nobody_sees_is_noticed_by_what_it_computes():
    model = shrink(Unseen(), 0.01)
    before = state(model)
    with pytest.raises(QuantError, match=r'the output of head changed from .* was not seen'):
        equalize_concats(model, data())
    assert same(before, state(model))


def test_ranges_are_dropped_where_something_changed():
    model = shrink(Fusion(), 0.01)
    calibrate(model, data())
    equalize_concats(model, data())
    assert uncalibrated(model) == list(quantizers(model))
    calibrate(model, data())
    assert not uncalibrated(model)


def test_concats_that_no_quantizer_reads_are_left_alone():
    model = shrink(Fusion(), 0.01)
    model.fuser._input_quantizer.keep_float('to try')
    result = equalize_concats(model, data())
    assert (result.moves, result.left, result.num_concats) == ((), (), 0)


def test_another_way_in_another_batch_is_refused():
    class Fickle(Fusion):
        def between(self, x):
            self.turn = not getattr(self, 'turn', False)
            return x if self.turn else x + 0

    model = shrink(Fickle(), 0.01)
    model.lidar[1].register_forward_hook(lambda module, x, y: y)
    result = equalize_concats(model, data(2))
    assert result.moves == () and result.left[0].reason == 'it takes another way in another batch'


def test_three_branches_of_three_sizes():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.parts = nn.ModuleList(block(3, 4) for _ in range(3))
            self.fuser = QuantConv2d(12, 2, 1)
            self.eval()
            with torch.no_grad():
                for i, factor in ((0, 2.0**-3), (2, 2.0**-8)):
                    for tensor in (self.parts[i][1].weight, self.parts[i][1].bias):
                        tensor.mul_(factor)
                    self.fuser.weight[:, 4 * i : 4 * i + 4].div_(factor)

        def forward(self, x):
            return self.fuser(torch.cat([part(x) for part in self.parts], 1))

    model = Three()
    before = float_outputs(model)
    moves = {move.branch: move for move in equalize_concats(model, data()).moves}
    assert moves.keys() == {0, 2} and moves[0].exponent == 3 and moves[2].exponent in (7, 8)
    assert all(torch.equal(a, b) for a, b in zip(before, float_outputs(model)))
    assert str(moves[0]) == 'input 0 of the concat in Three: parts.0.1 x 8, fuser[:, 0:4] / 8'


def test_no_batches_are_an_error():
    with pytest.raises(ValueError, match='no batches'):
        equalize_concats(Fusion(), [])
