"""Training through mmengine's Runner: what it refuses, keeps, freezes and resumes."""

import pytest
import torch
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant import UncalibratedError
from mmdet3d_quant.core import modes
from mmdet3d_quant.core.ties import unequal_ties
from mmdet3d_quant.files.checkpoint import read_checkpoint
from mmdet3d_quant.qat import QATHook
from tests.qat.toy import QAT, Toy, calibrated, runner

PARTS = dict(learn_amax=True, dropout=0.3)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    return calibrated(tmp_path_factory.mktemp('start') / 'int8.pth')


def weights(path):
    return read_checkpoint(path)['state_dict']


def test_an_uncalibrated_model_is_refused_with_the_remedy(tmp_path):
    torch.save(dict(state_dict=modes.float_state_dict(Toy())), tmp_path / 'float.pth')
    with pytest.raises(UncalibratedError, match=r'tools/calibrate\.py'):
        runner(tmp_path, tmp_path / 'float.pth', [QAT]).train()


def test_unequal_ties_are_refused(tmp_path, start):
    state = weights(start)
    state['b._input_quantizer._amax'] *= 2
    torch.save(dict(state_dict=state), tmp_path / 'untied.pth')
    with pytest.raises(ValueError, match='a._input_quantizer and b._input_quantizer must share'):
        runner(tmp_path, tmp_path / 'untied.pth', [QAT]).train()


def test_a_schedule_is_checked(tmp_path, start):
    with pytest.raises(ValueError, match="'observe'"):
        QATHook(schedule={0: {'*': 'observe'}})
    hook = dict(QAT, schedule={0: {'neck': 'float'}})
    with pytest.raises(ValueError, match="'neck' matches no quantizer"):
        runner(tmp_path, start, [hook]).train()


@pytest.mark.parametrize('learn', [False, True])
def test_ranges_stay_tied_weights_move_and_statistics_stand_still(learn, tmp_path, start):
    run = runner(tmp_path, start, [QAT], model=dict(learn_amax=learn))
    run.train()
    before, model = weights(start), run.model
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert {'a.weight', 'norm.weight', 'head.bias', 'a._weight_quantizer._amax'} <= moved
    assert not {'norm.running_mean', 'norm.running_var'} & moved
    assert ('a._input_quantizer._amax' in moved) == learn
    assert unequal_ties(model) == []
    for layer in (model.a, model.b, model.head):
        assert torch.equal(layer._weight_quantizer.amax, layer.weight_amax())
    assert all(q.mode == 'quant' for q in mq.quantizers(model).values())


@pytest.mark.parametrize('learn', [False, True])
def test_without_step_hooks_weights_are_followed_and_learning_stops(
    learn, tmp_path, start, monkeypatch
):
    run = runner(tmp_path, start, [QAT], model=dict(learn_amax=learn))
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    inner = torch.optim.AdamW.step.__wrapped__  # torch 2.0 to 2.14, as `hooked` below

    def bare(*args, **kwargs):  # what torch.compile makes of it
        return inner(*args, **kwargs)

    bare.hooked = True
    monkeypatch.setattr(torch.optim.AdamW, 'step', bare)
    if learn:
        with pytest.raises(RuntimeError, match='torch.compile'):
            run.train()
        return
    run.train()
    for layer in (run.model.a, run.model.b, run.model.head):
        assert torch.equal(layer._weight_quantizer.amax, layer.weight_amax())


def test_statistics_freeze_when_told(tmp_path, start):
    seen = []

    class Watch(nn.Identity):
        def forward(self, x):
            seen.append(run.model.norm.training)
            return x

    run = runner(tmp_path, start, [dict(QAT, freeze_bn=1)])
    run.model.dropout = Watch()
    run.train()
    assert seen == [True] * 4 + [False] * 4


def test_modes_follow_the_schedule(tmp_path, start):
    seen = []

    class Watch(nn.Identity):
        def forward(self, x):
            seen.append((run.model.a._input_quantizer.mode, run.model.head._input_quantizer.mode))
            return x

    hook = dict(QAT, schedule={0: {'*': 'float'}, 1: {'a': 'float'}, 2: {'*': 'quant'}})
    run = runner(tmp_path, start, [hook], epochs=3)
    run.model.dropout = Watch()
    run.train()
    wanted = [('float', 'float'), ('float', 'quant'), ('quant', 'quant')]
    assert seen == [modes for modes in wanted for _ in range(4)]


@pytest.mark.parametrize('by_epoch', [True, False])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(by_epoch, tmp_path, start):
    """With learned ranges and dropout; by iteration it stops in the middle of an epoch."""
    if by_epoch:
        last, full, half = 'epoch_3.pth', dict(max_epochs=3), dict(max_epochs=1)
        saving = dict(interval=1)
    else:
        last, full, half = 'iter_6.pth', dict(max_iters=6), dict(max_iters=3)
        saving = dict(interval=3)
    full, half, saving = (dict(part, by_epoch=by_epoch) for part in (full, half, saving))
    hooks = dict(checkpoint=dict(type='CheckpointHook', **saving))
    settings = dict(model=PARTS, default_hooks=hooks)
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    runner(whole, start, [QAT], train_cfg=full, **settings).train()
    runner(parts, start, [QAT], train_cfg=half, **settings).train()
    runner(parts, None, [QAT], train_cfg=full, resume=True, **settings).train()
    wanted, found = weights(whole / last), weights(parts / last)
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def test_dropout_differs_from_step_to_step_and_seed_to_seed(tmp_path, start):
    draws = []

    class Watch(nn.Identity):
        def forward(self, x):
            draws.append(torch.rand(1).item())
            return x

    for seed in (1, 2):
        run = runner(tmp_path, start, [QAT], epochs=1, randomness=dict(seed=seed))
        run.model.dropout = Watch()
        run.train()
    assert len(set(draws)) == len(draws) == 8


def test_gradient_accumulation_equals_a_larger_batch(tmp_path, start):
    found = []
    for batch, count in ((8, 1), (4, 2)):
        wrapper = dict(
            optimizer=dict(type='SGD', lr=0.05),
            accumulative_counts=count,
            paramwise_cfg=dict(custom_keys={'_amax': dict(lr_mult=100.0)}),
        )
        run = runner(
            tmp_path / str(batch),
            start,
            [QAT],
            model=dict(learn_amax=True),
            batch=batch,
            optim_wrapper=wrapper,
        )
        run.train()
        found.append(run.model.state_dict())
    whole, parts = found
    close = {n: torch.allclose(whole[n], parts[n], rtol=1e-4, atol=1e-6) for n in whole}
    assert all(close.values()), close
    for name in ('a.weight', 'a._input_quantizer._amax'):
        assert not torch.equal(whole[name], weights(start)[name])


def test_mixed_precision_trains(tmp_path, start):
    wrapper = dict(type='BFloat16OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2))
    run = runner(tmp_path, start, [QAT], model=dict(learn_amax=True), optim_wrapper=wrapper)
    run.train()
    state = run.model.state_dict()
    assert all(v.dtype != torch.bfloat16 and torch.isfinite(v).all() for v in state.values())
    assert unequal_ties(run.model) == []


def test_float_scores_stand_beside_quantized_ones(tmp_path, start):
    run = runner(tmp_path, start, [dict(QAT, validate_float=True)], epochs=1, val=True)
    run.train()
    quantized, beside = (
        run.message_hub.get_scalar(f'val/{prefix}error').current() for prefix in ('', 'float/')
    )
    assert quantized != beside
    assert run.val()['error'] == quantized
    with mq.set_mode(run.model, 'float'):
        assert run.val()['error'] == beside


def test_training_helps_a_model_with_ruined_ranges(tmp_path, start):
    state = weights(start)
    for name in state:
        if name.endswith('_input_quantizer._amax'):
            state[name] *= 16
    torch.save(dict(state_dict=state), tmp_path / 'ruined.pth')
    errors = []
    for lr in (0.0, 1e-2):
        wrapper = dict(optimizer=dict(type='AdamW', lr=lr))
        run = runner(
            tmp_path / str(lr),
            tmp_path / 'ruined.pth',
            [QAT],
            epochs=10,
            model=dict(learn_amax=True),
            val=True,
            optim_wrapper=wrapper,
        )
        run.train()
        errors.append(run.val()['error'])
    assert errors[1] < errors[0] / 2


def test_weight_decay_on_ranges_is_told(tmp_path, start):
    run = runner(tmp_path, start, [QAT], epochs=1, model=dict(learn_amax=True))
    said = []
    run.logger.warning = lambda text, *a: said.append(text)
    run.train()
    assert any('decay_mult=0' in text for text in said)


@pytest.mark.usefixtures('same_optimizers')
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 4),
    reason='an older torch takes step hooks off optimizers',
)
@pytest.mark.parametrize('learn', [False, True])
def test_a_compiled_step_is_that_of_an_eager_run(learn, tmp_path, start):
    ends = []
    for name, kw in (('eager', {}), ('compiled', dict(compile=dict(backend='aot_eager')))):
        kw.update(batch=16, epochs=1)  # a step: later ones of Adam magnify what rounding does
        run = runner(tmp_path / name, start, [QAT], model=dict(learn_amax=learn), **kw)
        run.train()
        assert unequal_ties(run.model) == []
        ends.append(run.model.state_dict())
    before, (eager, compiled) = weights(start), ends
    key = 'a._input_quantizer._amax'
    assert torch.equal(before[key], compiled[key]) != learn
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-5, msg=key)
