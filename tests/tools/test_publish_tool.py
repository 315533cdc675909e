"""tools/publish_checkpoint.py: weights stay, the rest goes."""

import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from mmdet3d_quant.files.checkpoint import CheckpointError
from mmdet3d_quant.files.outputs import sha256
from tests.small import ROOT

sys.path.insert(0, str(ROOT / 'tools'))
import publish_checkpoint  # noqa: E402


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))


@pytest.fixture
def trained(tmp_path):
    """What mmengine leaves: weights, the optimizer, logs."""
    model = net()
    model(torch.randn(4, 3, 3, 3) * 100)  # moves the running statistics
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = dict(
        state_dict=OrderedDict(model.state_dict(), range_amax=torch.ones(8, 1) / 3),
        meta=dict(epoch=3, seed=7, cfg='lr = 1', hostname='desk', time='noon'),
        optimizer=optimizer.state_dict(),
    )
    torch.save(checkpoint, tmp_path / 'epoch_3.pth')
    return tmp_path / 'epoch_3.pth', checkpoint['state_dict']


def publish(path, *flags):
    out = path.with_name('out.pth')
    publish_checkpoint.main([str(path), '--out', str(out), *flags])
    return torch.load(out, weights_only=True)


def test_weights_stay_and_the_rest_goes(trained):
    path, state = trained
    found = publish(path)
    assert found.keys() == {'state_dict', 'meta'}
    assert found['meta'] == dict(
        epoch=3,
        seed=7,
        cfg='lr = 1',
        source_checkpoint=dict(name='epoch_3.pth', sha256=sha256(path)),
    )
    assert all(torch.equal(v, found['state_dict'][k]) for k, v in state.items())


def test_halved_weights_load_into_a_float32_model(trained):
    path, state = trained
    found = publish(path, '--half')['state_dict']
    halved = {name for name, value in found.items() if value.dtype == torch.float16}
    assert halved == {'0.weight', '3.weight'}
    assert all(torch.equal(state[n], found[n]) for n in state.keys() - halved)
    del found['range_amax']
    model = net()
    model.load_state_dict(found)
    assert model[0].weight.dtype == torch.float32
    torch.testing.assert_close(model[0].weight.detach(), state['0.weight'], rtol=2**-11, atol=1e-7)


def test_tensors_of_a_type_share_a_record(trained):
    """Weights, halved weights and counters: three, in the order of the state dict."""
    path, state = trained
    assert list(publish(path, '--half')['state_dict']) == list(state)
    with zipfile.ZipFile(path.with_name('out.pth')) as file:
        records = [name for name in file.namelist() if '/data/' in name]
    assert len(records) == 3 < len(state)


@pytest.mark.parametrize(
    'value, flags, message',
    [(float('nan'), [], 'holds NaN or infinity'), (1e5, ['--half'], 'omit --half')],
)
def test_nothing_is_written_for_numbers_that_cannot_be(trained, value, flags, message):
    path, state = trained
    state['3.weight'][0, 0] = value
    torch.save(dict(state_dict=state, meta={}), path)
    with pytest.raises(CheckpointError, match=f'3.weight.*{message}'):
        publish(path, *flags)
    assert [p.name for p in path.parent.iterdir()] == ['epoch_3.pth']
