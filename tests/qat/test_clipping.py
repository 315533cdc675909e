"""Channels that come to life in training are told of where fixed ranges clip them."""

import re

import pytest
import torch

import mmdet3d_quant as mq
from mmdet3d_quant.files.checkpoint import read_checkpoint
from mmdet3d_quant.qat import clipping
from tests.qat.toy import QAT, Points, Toy, runner


@pytest.fixture(scope='module')
def woken(tmp_path_factory):
    """A checkpoint whose batch norm was still in half of the channels when ranges were chosen."""
    torch.manual_seed(0)
    model, data = Toy(), Points()
    model.norm.weight.data = torch.tensor([0.1] * 4 + [0.0] * 4)
    mq.calibrate(model, [data.images[:8], data.images[8:]])
    model.norm.weight.data[4:] = 3.0
    path = tmp_path_factory.mktemp('woken') / 'int8.pth'
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    return path


def trained(work, start, lr=0.0, **kwargs):
    """The model after training, and the warnings about it."""
    wrapper = dict(optimizer=dict(type='Adam', lr=lr))
    run = runner(work, start, [QAT], batch=16, optim_wrapper=wrapper, **kwargs)
    said = []
    run.logger.warning = lambda text, *a: said.append(text)
    run.train()
    return run.model, [text for text in said if 'QATHook' in text]


def test_what_fixed_ranges_clip_is_told_once_by_name_and_share(woken, tmp_path):
    model, said = trained(tmp_path, woken, epochs=3)
    seen = []
    model.dropout.register_forward_hook(lambda *args: seen.append(args[2]))
    model.eval()(Points().images)
    share = (seen[0] > model.head._input_quantizer.amax).float().mean().item()
    assert 0.1 < share < 0.5
    (text,) = said
    assert 'iteration 1' in text and 'learn_amax=True' in text and 'tools/calibrate.py' in text
    assert re.findall(r'(\w+\._input_quantizer) ([\d.]+%)', text) == [
        ('head._input_quantizer', f'{share:.1%}')
    ]


def test_clipping_that_begins_in_training_is_told(tmp_path, woken):
    state = read_checkpoint(woken)['state_dict']
    state['norm.weight'][4:] = 0.0
    torch.save(dict(state_dict=state, meta={}), tmp_path / 'still.pth')
    _, said = trained(tmp_path / 'still', tmp_path / 'still.pth', epochs=2)
    assert said == []
    _, said = trained(tmp_path / 'wakes', tmp_path / 'still.pth', epochs=8, lr=0.3)
    assert 'head._input_quantizer' in said[0] and 'iteration 1 ' not in said[0]


@pytest.mark.parametrize('how', ['learned', 'float stage'])
def test_ranges_that_are_learned_or_not_in_use_are_no_matter(how, woken, tmp_path):
    model = dict(learn_amax=how == 'learned')
    hook = dict(QAT, schedule={0: {'*': 'float'}} if how == 'float stage' else None)
    run = runner(tmp_path, woken, [hook], batch=16, model=model)
    said = []
    run.logger.warning = lambda text, *a: said.append(text)
    run.train()
    assert not [text for text in said if 'clip' in text]


def test_looking_changes_nothing(woken, tmp_path, monkeypatch):
    looked, _ = trained(tmp_path / 'looked', woken, lr=0.01, val=True)
    monkeypatch.setattr(clipping.Clipping, 'start', lambda self: None)
    unseen, _ = trained(tmp_path / 'unseen', woken, lr=0.01, val=True)
    for name, value in looked.state_dict().items():
        assert torch.equal(value, unseen.state_dict()[name]), name
    assert not any(q._forward_pre_hooks for q in mq.quantizers(looked).values())


def test_a_large_tensor_is_looked_at_in_all_its_channels():
    torch.manual_seed(0)
    model = torch.nn.Sequential(mq.layers.QuantConv2d(16, 1, 1))
    x = torch.zeros(2, 16, 256, 256)
    x[:, 3] = 4.0
    x[:, 5, :, 100] = 4.0
    mq.calibrate(model, [x / 4], 'max')
    for layout in (torch.contiguous_format, torch.channels_last):
        watched = clipping.Clipping(model)
        watched.start()
        model(x.contiguous(memory_format=layout))
        (share,) = watched.stop().values()
        assert share == pytest.approx((1 + 1 / 256) / 16, rel=0.02)
