"""Which of the things in a checkpoint are its weights, and what is said of it."""

import pytest
import torch
from mmengine.runner.checkpoint import load_checkpoint as mmengine_load
from torch import nn

from mmdet3d_quant.files import weights
from mmdet3d_quant.files.checkpoint import CheckpointError, read_checkpoint, use_one_door


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(weights, 'print_log', lambda text, **how: lines.append(text))
    return lines


@pytest.mark.parametrize('key', weights.KEYS)
def test_weights_are_found_under_every_key(tmp_path, told, key):
    torch.manual_seed(0)
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save({'epoch': 3, key: source.state_dict(), 'optimizer': dict(lr=1)}, tmp_path / 'c.pth')
    found = read_checkpoint(tmp_path / 'c.pth')['state_dict']
    assert torch.equal(found['weight'], source.weight)
    assert told == (
        [] if key == 'state_dict' else [f'{tmp_path}/c.pth: weights are taken from {key}']
    )
    use_one_door()
    mmengine_load(target, str(tmp_path / 'c.pth'), strict=True)  # as the tools that follow do
    assert torch.equal(target.weight, source.weight)


def test_of_two_the_one_that_mmengine_takes_is_told(tmp_path, told):
    first, second = nn.Linear(2, 2).state_dict(), nn.Linear(2, 2).state_dict()
    torch.save(dict(ema_state_dict=second, state_dict=first), tmp_path / 'c.pth')
    found = read_checkpoint(tmp_path / 'c.pth')['state_dict']
    assert torch.equal(found['weight'], first['weight'])
    assert 'taken from state_dict, as mmengine does' in told[0]
    assert told[0].endswith('ema_state_dict of the same file not')


class Armed(nn.Module):
    """Its code leaves a mark when it is unpickled."""

    ran = False

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer('passing', torch.ones(1), persistent=False)

    def __setstate__(self, state):
        Armed.ran = True
        super().__setstate__(state)


@pytest.mark.parametrize('place', ['whole', 'model'])
def test_of_a_model_pickled_whole_the_weights_are_read_and_no_code_runs(tmp_path, told, place):
    model = nn.DataParallel(nn.Sequential(Armed(), nn.Linear(3, 3)))
    torch.save(model if place == 'whole' else dict(model=model), tmp_path / 'ptq.pth')
    Armed.ran = False
    torch.load(tmp_path / 'ptq.pth', weights_only=False)
    assert Armed.ran  # so it can run
    Armed.ran = False
    found = read_checkpoint(tmp_path / 'ptq.pth')['state_dict']
    assert not Armed.ran
    expected = model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any('pickled whole (torch.nn.parallel.data_parallel.DataParallel)' in t for t in told)


def test_a_module_that_holds_itself_ends(tmp_path):
    model = nn.Linear(2, 2)
    model._modules['again'] = model
    torch.save(model, tmp_path / 'c.pth')
    assert list(read_checkpoint(tmp_path / 'c.pth')['state_dict']) == ['weight', 'bias']


def test_a_module_named_without_end_is_refused(tmp_path):
    """Sixty modules, each the two children of the next: 2**60 names."""
    model = nn.Linear(2, 2)
    for _ in range(60):
        outer = nn.Module()
        outer.a = outer.b = model
        model = outer
    torch.save(model, tmp_path / 'c.pth')
    with pytest.raises(CheckpointError, match='c.pth has no state_dict but an object of'):
        read_checkpoint(tmp_path / 'c.pth')


@pytest.mark.parametrize(
    'data, match',
    [
        (dict(epoch=1, optimizer=dict(lr=1)), 'no state_dict, it holds epoch, optimizer: save'),
        ([torch.ones(1)], 'holds a list: save'),
        (torch.ones(1), 'holds a Tensor: save'),
        (dict(state_dict={}), 'its state_dict is empty: save'),
        (nn.ReLU(), 'object of torch.nn.modules.activation.ReLU, which is not read.*save'),
    ],
)
def test_files_without_weights_say_what_they_hold(tmp_path, data, match):
    torch.save(data, tmp_path / 'bad.pth')
    with pytest.raises(CheckpointError, match=f'bad.pth.*{match}'):
        read_checkpoint(tmp_path / 'bad.pth')
