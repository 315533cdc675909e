"""Frozen modules stay bit for bit what they were; all others are trained."""

import pytest
import torch

from tests.qat.toy import QAT, calibrated, runner


def test_frozen_modules_keep_weights_and_statistics_and_others_train(tmp_path):
    start = calibrated(tmp_path / 'int8.pth')
    frozen = dict(type='FreezeHook', modules=['a', 'norm'])
    run = runner(tmp_path / 'run', start, [dict(QAT), frozen], val=True)
    run.train()
    before = torch.load(start, weights_only=True)['state_dict']
    after = run.model.state_dict()
    changed = {n.split('.')[0] for n in after if not torch.equal(after[n], before[n])}
    assert changed == {'b', 'head'}


def test_names_that_are_none_of_the_model_are_errors(tmp_path):
    start = calibrated(tmp_path / 'int8.pth')
    with pytest.raises(ValueError, match="no module 'backbone'"):
        runner(tmp_path / 'run', start, [dict(type='FreezeHook', modules=['backbone'])]).train()
    with pytest.raises(ValueError, match='list of module names'):
        runner(tmp_path / 'other', start, [dict(type='FreezeHook', modules='norm')])
