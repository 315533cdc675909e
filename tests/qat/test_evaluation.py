"""What is validated, tested and saved: the quantized model, with ranges of its own weights."""

import copy
import itertools

import pytest
import torch
from mmengine.evaluator import Evaluator

import mmdet3d_quant as mq
from mmdet3d_quant.core.modes import keep_float
from mmdet3d_quant.files.checkpoint import read_checkpoint, read_training
from tests.qat.toy import QAT, Error, Points, Toy, calibrated, runner

#: Averages that lie far from the weights after a few steps at a high rate.
EMA = {
    'ExponentialMovingAverage': dict(type='EMAHook', momentum=0.3),
    'buffers': dict(type='EMAHook', momentum=0.3, update_buffers=True),
    'ExpMomentumEMA': dict(type='EMAHook', ema_type='mmdet.ExpMomentumEMA', momentum=0.2, gamma=2),
}
FAST = dict(optimizer=dict(type='AdamW', lr=0.1))
LAYERS = ('a', 'b', 'head')


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    return calibrated(tmp_path_factory.mktemp('start') / 'int8.pth')


def modes(model):
    return {name: q.mode for name, q in mq.quantizers(model).items()}


class Spy(Error):
    """Notes the modes that a batch was evaluated in, and fails when asked."""

    seen, fails = [], False

    def process(self, data_batch, data_samples):
        self.seen.append(modes(self.model))
        if self.fails:
            raise RuntimeError('no way')
        super().process(data_batch, data_samples)


def spied(tmp_path, start, stage, **kwargs):
    spy = Spy()
    spy.seen = []
    data = dict(batch_size=8, num_workers=0, dataset=Points(), sampler=dict(type='DefaultSampler'))
    hook = dict(QAT, schedule={0: stage}, **kwargs.pop('hook', {}))
    test = dict(test_dataloader=data, test_cfg=dict(), test_evaluator=Evaluator(spy))
    run = runner(
        tmp_path, start, [hook], val=True, **{**test, 'val_evaluator': Evaluator(spy), **kwargs}
    )
    spy.model = run.model
    return run, spy


LOOPS = {
    'epoch': dict(by_epoch=True, max_epochs=2, val_interval=1),
    'iter': dict(by_epoch=False, max_iters=4, val_interval=2),
}


@pytest.mark.parametrize('loop', LOOPS)
def test_a_float_stage_is_trained_in_float_and_validated_quantized(loop, tmp_path, start):
    run, spy = spied(tmp_path, start, {'*': 'float', 'a': 'quant'}, train_cfg=LOOPS[loop])
    keep_float(run.model, 'b._input_quantizer')
    trained = []
    run.model.dropout.register_forward_hook(
        lambda module, *_: trained.append(modes(run.model)) if module.training else None
    )
    run.train()
    run.test()
    wanted = dict.fromkeys(modes(run.model), 'quant')
    wanted['b._input_quantizer'] = 'float'
    assert spy.seen and all(seen == wanted for seen in spy.seen)
    part = {name: 'quant' if name.startswith('a.') else 'float' for name in wanted}
    assert trained and all(seen == part for seen in trained)


def test_scores_of_a_float_stage_are_those_of_the_checkpoints(tmp_path, start):
    run = runner(tmp_path, start, [dict(QAT, schedule={0: {'*': 'float'}})], epochs=1, val=True)
    run.train()
    assert run.message_hub.get_scalar('val/error').current() == score(tmp_path / 'epoch_1.pth')


@pytest.mark.parametrize('loop', LOOPS)
def test_after_a_validation_that_failed_training_goes_on_in_its_stage(loop, tmp_path, start):
    run, spy = spied(tmp_path, start, {'*': 'float'}, train_cfg=LOOPS[loop])
    spy.fails = True
    with pytest.raises(RuntimeError, match='no way'):
        run.train()
    spy.fails, trained = False, []
    run.model.dropout.register_forward_hook(
        lambda module, *_: trained.append(modes(run.model)) if module.training else None
    )
    run.train_loop.run()
    assert all(set(seen.values()) == {'quant'} for seen in spy.seen)
    assert trained and all(set(seen.values()) == {'float'} for seen in trained)


def test_modes_set_by_hand_stay(tmp_path, start):
    run, spy = spied(tmp_path, start, {'*': 'float'})
    run.train()
    assert set(modes(run.model).values()) == {'quant'}
    spy.seen.clear()
    with mq.set_mode(run.model, 'float'):
        run.test()
        assert set(modes(run.model).values()) == {'float'}
    assert spy.seen and all(set(seen.values()) == {'float'} for seen in spy.seen)


def score(path, mode='quant'):
    """The error of a checkpoint in a model of its own, batch by batch as the loop does."""
    model, data, metric = Toy(), Points(), Error()
    model.load_state_dict(read_checkpoint(path)['state_dict'])
    mq.set_mode(model.eval(), mode)
    for i in range(0, len(data), 4):
        batch = dict(inputs=data.images[i : i + 4], data_samples=data.wanted[i : i + 4])
        with torch.no_grad():
            metric.process(batch, model(**batch, mode='predict'))
    return metric.compute_metrics(metric.results)['error']


def assert_own_ranges(state, prefix=''):
    for name in LAYERS:
        weight = state[f'{prefix}{name}.weight']
        amax = state[f'{prefix}{name}._weight_quantizer._amax']
        assert torch.equal(amax, weight.abs().amax((1, 2, 3), keepdim=True)), name


#: EMAHook first and last in the config, and by priority before and after all others.
ORDERS = {
    'first': lambda ema: [ema, QAT],
    'last': lambda ema: [QAT, ema],
    'high': lambda ema: [QAT, dict(ema, priority='HIGH')],
    'low': lambda ema: [dict(ema, priority='LOW'), QAT],
    'lowest': lambda ema: [dict(ema, priority='LOWEST'), QAT],
}


@pytest.mark.parametrize('order, kind', itertools.product(ORDERS, EMA))
def test_averaged_weights_are_scored_and_saved_with_ranges_of_their_own(
    order, kind, tmp_path, start
):
    # Below CheckpointHook, EMAHook has not put the weights back when that saves the best.
    best = {} if order == 'lowest' else dict(save_best='error', rule='less')
    saving = dict(checkpoint=dict(type='CheckpointHook', interval=1, **best))
    hooks = ORDERS[order](EMA[kind])
    hooks = [dict(h, validate_float=True) if h['type'] == 'QATHook' else h for h in hooks]
    run = runner(tmp_path, start, hooks, val=True, optim_wrapper=FAST, default_hooks=saving)
    run.train()
    assert_own_ranges(run.model.state_dict())
    saved = read_training(tmp_path / 'epoch_2.pth')
    assert_own_ranges(saved['state_dict'])
    assert_own_ranges(saved['ema_state_dict'], 'module.')
    assert not torch.equal(saved['state_dict']['a.weight'], run.model.a.weight)
    for path in tmp_path.glob('best_*.pth'):
        assert_own_ranges(read_checkpoint(path)['state_dict'])
    printed = [run.message_hub.get_scalar(f'val/{part}error').current() for part in ('', 'float/')]
    last = tmp_path / 'epoch_2.pth'
    assert printed == [score(last), score(last, 'float')]


@pytest.mark.parametrize('order', ORDERS)
def test_resuming_with_averages_is_exact(order, tmp_path, start):
    hooks = ORDERS[order](EMA['ExponentialMovingAverage'])
    settings = dict(val=True, model=dict(dropout=0.3, learn_amax=True), optim_wrapper=FAST)
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    runner(whole, start, copy.deepcopy(hooks), epochs=3, **settings).train()
    runner(parts, start, copy.deepcopy(hooks), epochs=1, **settings).train()
    again = runner(parts, None, copy.deepcopy(hooks), epochs=3, resume=True, **settings)
    again.train()
    for key in ('state_dict', 'ema_state_dict'):
        wanted, found = (read_training(path / 'epoch_3.pth')[key] for path in (whole, parts))
        assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    # An evaluation of the resumed run, without training, is of the averaged weights too.
    alone = runner(parts, None, copy.deepcopy(hooks), epochs=3, resume=True, **settings)
    alone.train_loop  # noqa: B018  resuming sets its epoch
    assert alone.val()['error'] == again.message_hub.get_scalar('val/error').current()


@pytest.mark.parametrize('order', ORDERS)
def test_gradients_after_an_evaluation_of_averages_are_those_of_a_stranger(order, tmp_path, start):
    """Of a copy that knows nothing of what lay inside its range, with a range that clips."""
    state = read_checkpoint(start)['state_dict']
    state['a._weight_quantizer._amax'] *= 0.7
    torch.save(dict(state_dict=state), tmp_path / 'narrow.pth')
    hooks = ORDERS[order](EMA['ExponentialMovingAverage'])
    run = runner(tmp_path, tmp_path / 'narrow.pth', hooks, val=True, optim_wrapper=FAST)
    run.train()
    stranger = Toy()
    stranger.load_state_dict(copy.deepcopy(run.model.state_dict()))
    data = Points()
    for model in (run.model.eval(), stranger.eval()):
        model.zero_grad()
        model(data.images, data.wanted, mode='loss')['loss'].backward()
    for name in LAYERS:
        found, wanted = (getattr(m, name).weight.grad for m in (run.model, stranger))
        assert torch.equal(found, wanted)
    layer = run.model.a
    beyond = layer.weight.abs() > layer._weight_quantizer.amax
    assert beyond.any() and (layer.weight.grad[beyond] == 0).all()
