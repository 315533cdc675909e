"""The schedule by iteration, with accumulated gradients, and in a model that is frozen in part."""

import pytest
import torch

from mmdet3d_quant.core.ties import unequal_ties
from mmdet3d_quant.files.checkpoint import read_checkpoint
from tests.qat.toy import QAT, calibrated, runner

BY_ITER = dict(by_epoch=False, max_iters=4, val_interval=1)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    return calibrated(tmp_path_factory.mktemp('start') / 'int8.pth')


def test_stages_by_iteration_with_validations_between_and_accumulated_gradients(tmp_path, start):
    stages = {0: {'*': 'float'}, 1: {'a': 'float'}, 3: {'*': 'quant'}}
    wrapper = dict(optimizer=dict(type='SGD', lr=0.05), accumulative_counts=2)
    run = runner(
        tmp_path,
        start,
        [dict(QAT, schedule=stages, freeze_bn=2)],
        model=dict(learn_amax=True),
        val=True,
        train_cfg=BY_ITER,
        optim_wrapper=wrapper,
    )
    seen, model = [], run.model

    def note(*_):
        kinds = tuple(getattr(model, n)._input_quantizer.mode for n in ('a', 'head'))
        if model.training:
            state = {n: v.clone() for n, v in model.state_dict().items()}
            seen.append((*kinds, model.norm.training, state))
        else:
            assert kinds == ('quant', 'quant')

    model.dropout.register_forward_hook(note)
    run.train()
    modes = ['float float', 'float quant', 'float quant', 'quant quant']
    assert [f'{a} {head}' for a, head, *_ in seen] == modes
    assert [norm for _, _, norm, _ in seen] == [True, True, False, False]
    states = [state for *_, state in seen] + [model.state_dict()]
    moved = [not torch.equal(a['a.weight'], b['a.weight']) for a, b in zip(states, states[1:])]
    assert moved == [False, True, False, True]
    for state in states:
        amax = state['a._weight_quantizer._amax']
        assert torch.equal(amax, state['a.weight'].abs().amax((1, 2, 3), keepdim=True))
    assert unequal_ties(model) == []


@pytest.mark.parametrize('learn', [False, True])
def test_what_is_frozen_stays_and_the_rest_is_trained(learn, tmp_path, start):
    """One of two convolutions that share a range: the range goes on with the other."""
    rates = dict(custom_keys={'_amax': dict(lr_mult=5.0, decay_mult=0)})
    wrapper = dict(optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.01), paramwise_cfg=rates)
    run = runner(tmp_path, start, [QAT], model=dict(learn_amax=learn), optim_wrapper=wrapper)
    model = run.model
    model.a.requires_grad_(False)
    before = read_checkpoint(start)['state_dict']
    run.train()
    after = read_checkpoint(tmp_path / 'epoch_2.pth')['state_dict']
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert {'b.weight', 'b._weight_quantizer._amax', 'head.weight'} <= moved
    assert not {'a.weight', 'a.bias', 'a._weight_quantizer._amax'} & moved
    assert ('a._input_quantizer._amax' in moved) == learn
    assert unequal_ties(model) == []
