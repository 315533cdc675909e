"""What goes wrong in training: divergence, interrupts, optimizers, resuming of another run."""

import pytest
import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.files.errors import CheckpointError
from tests.qat.toy import QAT, Toy, calibrated, runner

LEARNED = dict(learn_amax=True)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    return calibrated(tmp_path_factory.mktemp('start') / 'int8.pth')


def wrapper(lr=1e-2, **keys):
    keys = {key: dict(lr_mult=mult, decay_mult=0) for key, mult in keys.items()}
    optimizer = dict(type='AdamW', lr=lr, weight_decay=0.01)
    return dict(optimizer=optimizer, paramwise_cfg=dict(custom_keys=keys))


def moved(run):
    return [name for name, q in mq.quantizers(run.model).items() if q.learned]


@pytest.mark.parametrize(
    'learn, optim, lost',
    [
        (False, dict(optimizer=dict(type='SGD', lr=1e30)), 'head._weight_quantizer'),
        (True, dict(optimizer=dict(type='SGD', lr=1e6)), 'head._input_quantizer'),
        (True, wrapper(_amax=2000), 'join._input_quantizer'),
    ],
    ids=['weights', 'ranges', 'nothing'],
)
def test_a_run_that_diverged_saves_no_checkpoint_and_names_the_ranges(
    learn, optim, lost, tmp_path, start
):
    run = runner(tmp_path, start, [QAT], model=dict(learn_amax=learn), optim_wrapper=optim)
    with pytest.raises(RuntimeError, match='diverged') as caught:
        run.train()
    assert lost in str(caught.value) and 'learning rate' in str(caught.value)
    assert not list(tmp_path.glob('*.pth'))


def test_a_range_that_was_nothing_from_the_start_is_no_divergence(tmp_path, start):
    state = torch.load(start, weights_only=False)
    state['state_dict']['head._input_quantizer._amax'] *= 0
    torch.save(state, tmp_path / 'dead.pth')
    runner(tmp_path, tmp_path / 'dead.pth', [QAT], epochs=1, model=LEARNED).train()
    assert (tmp_path / 'epoch_1.pth').is_file()


def test_two_hooks_are_refused(tmp_path, start):
    with pytest.raises(ValueError, match='several QATHooks'):
        runner(tmp_path, start, [QAT, dict(QAT)], model=LEARNED).train()


def test_training_goes_on_after_an_interrupt_as_if_the_hooks_were_new(tmp_path, start):
    """Ranges after one more step, against those of a fresh hook on the same weights."""

    class Stop(nn.Identity):
        def forward(self, x):
            raise KeyboardInterrupt

    distill = dict(type='DistillHook', checkpoint=str(start), modules={'norm': 1.0})
    found = []
    for interrupted in (False, True):
        work = tmp_path / str(interrupted)
        run = runner(work, start, [QAT, distill], epochs=1, model=LEARNED)
        if interrupted:
            dropout, run.model.dropout = run.model.dropout, Stop()
            with pytest.raises(KeyboardInterrupt):
                run.train()
            run.model.dropout = dropout
        run.train()
        found.append([run.model.state_dict()[f'{name}._amax'] for name in moved(run)])
    assert found[0] and all(torch.equal(a, b) for a, b in zip(*found))


def test_learning_rates_that_differ_among_ranges_are_told(tmp_path, start):
    for key, told in (('a._input_quantizer', True), ('_quantizer._amax', False)):
        run = runner(
            tmp_path / key, start, [QAT], 1, LEARNED, optim_wrapper=wrapper(_amax=50, **{key: 0.1})
        )
        said = []
        run.logger.warning = lambda text, *a, said=said: said.append(text)
        run.train()
        found = [text for text in said if 'different learning rates' in text]
        assert bool(found) == told, said
        assert not told or '0.001 for a._input_quantizer._amax, 0.5 for' in found[0]


@pytest.mark.parametrize('before, after', [(False, True), (True, False)])
def test_resuming_with_other_parameters_says_what_to_do(before, after, tmp_path, start):
    runner(tmp_path, start, [QAT], epochs=1, model=dict(learn_amax=before)).train()
    again = runner(tmp_path, None, [QAT], model=dict(learn_amax=after), resume=True)
    with pytest.raises(CheckpointError, match='learn_amax.*load_from'):
        again.train()
    saved = tmp_path / 'epoch_1.pth'  # what the message says
    runner(tmp_path / 'new', saved, [QAT], epochs=1, model=dict(learn_amax=after)).train()


class TwoOptimizers(Toy):
    """Steps two optimizers with one loss."""

    def train_step(self, data, optim_wrapper):
        loss = self(**data, mode='loss')['loss']
        loss.backward()
        for one in optim_wrapper.values():
            one.step()
            one.zero_grad()
        return dict(loss=loss.detach())


@pytest.mark.parametrize('learn, together', [(False, True), (True, True), (True, False)])
def test_several_optimizers(learn, together, tmp_path, start):
    run = runner(tmp_path, start, [QAT], epochs=1, model=dict(learn_amax=learn))
    run.model = model = TwoOptimizers(learn_amax=learn)
    parts = ([], [])
    for name, p in model.named_parameters():
        parts[name.startswith('head') and not (together and '_amax' in name)].append(p)
    wrappers = [OptimWrapper(torch.optim.SGD(part, lr=1e-2)) for part in parts]
    run.optim_wrapper = OptimWrapperDict(rest=wrappers[0], head=wrappers[1])
    if not together:
        with pytest.raises(ValueError, match=r'no optimizer .* not head\._input_quantizer\._amax'):
            run.train()
        return
    run.train()
    for layer in (model.a, model.b, model.head):
        assert torch.equal(layer._weight_quantizer.amax, layer.weight_amax())


def test_statistics_of_norms_that_are_none_of_torchs_stand_still(tmp_path, start):
    """As those of mmcv's SyncBatchNorm, which trains on a GPU only."""

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('running_mean', torch.zeros(8))
            self.register_buffer('running_var', torch.ones(8))

        def forward(self, x):
            if self.training:
                self.running_mean += 1
            return x

    run = runner(tmp_path, start, [QAT], epochs=1)
    run.model.dropout = foreign = Foreign()
    run.train()
    assert foreign.running_mean.abs().sum() == 0
