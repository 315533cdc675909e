"""Batches held out, and shared out among processes."""

import pytest
import torch
from torch.utils.data import DataLoader

from mmdet3d_quant import calibrate
from mmdet3d_quant.calibration.calibrate_model import HELD_OUT
from mmdet3d_quant.jobs.share import Share, hold_out
from mmdet3d_quant.layers import QuantConv2d


@pytest.mark.parametrize('count, held', [(2, 1), (HELD_OUT, 1), (2 * HELD_OUT, 2)])
def test_the_last_batches_are_held_out(count, held):
    batches = {n: [n] for n in range(count)}
    stay, out = hold_out(batches)
    assert {**stay, **out} == batches and list(out) == list(range(count))[-held:]


@pytest.mark.parametrize('count', [2, HELD_OUT - 1, HELD_OUT, 2 * HELD_OUT, 3 * HELD_OUT + 5])
def test_python_and_the_tool_hold_the_same_batches_out(count):
    data, seen = {n: torch.full((1, 1, 2, 2), n + 1.0) for n in range(count)}, []
    calibrate(
        QuantConv2d(1, 1, 1),
        iter(data.values()),
        'max',
        after=[lambda model, choices, batches: seen.extend(float(x.max()) for _, x in batches)],
    )
    assert seen == [n + 1.0 for n in hold_out(data)[1]]


def test_one_batch_is_too_few_to_hold_out():
    with pytest.raises(ValueError, match='at least 2 batches'):
        hold_out({0: [0]})


def test_processes_load_every_batch_once():
    batches = {n: [2 * n, 2 * n + 1] for n in range(5)}
    loader, found = DataLoader(torch.arange(10)), {}
    for rank in range(2):
        for number, batch in Share('calib_dataloader', loader, batches, {}, rank, 2).load(batches):
            assert number not in found
            found[number] = batch.tolist()
    assert found == batches
