"""A stranger's checkpoint is data: by no door does it run code, and the user is told."""

import os
import pickle
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.runner.checkpoint import load_checkpoint as mmengine_load

from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.files import checkpoint as door
from mmdet3d_quant.files.checkpoint import CheckpointError, read_checkpoint, read_training
from tests.qat.toy import Toy, calibrated
from tests.qat.toy_config import config
from tests.small import ROOT
from tests.tools.tiny import TEST, TRAIN

sys.path.insert(0, str(ROOT / 'tools'))
import calibrate  # noqa: E402
import convert_checkpoint  # noqa: E402
import export_onnx  # noqa: E402
import publish_checkpoint  # noqa: E402


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f'touch {self.path}',))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """What mmengine saves after an epoch of the toy, and the calibrated start."""
    folder = tmp_path_factory.mktemp('trained')
    calibrated(folder / 'int8.pth')
    TRAIN.main([str(config(folder)), '--work-dir', str(folder / 'run')])
    return read_training(folder / 'run/epoch_1.pth'), folder


PLACES = ('top', 'state_dict', 'meta', 'optimizer', 'message_hub')


def plant(good, bomb, place):
    """The checkpoint of a training with a payload in one place."""
    data = {key: dict(value) for key, value in good.items() if isinstance(value, dict)}
    if place == 'top':
        return bomb
    if place == 'message_hub':
        data[place] = dict(data[place], log_scalars=OrderedDict(loss=bomb))
    else:
        data[place]['planted'] = bomb
    return data


def train(*args, **changes):
    def run(bad, folder):
        named = {k: v(bad) if callable(v) else v for k, v in changes.items()}
        (folder / 'run').mkdir(exist_ok=True)
        (folder / 'run/last_checkpoint').write_text(str(bad))
        words = [str(bad) if word == 'BAD' else word for word in args]
        path = config(folder, epochs=2, **named)
        TRAIN.main([str(path), '--work-dir', str(folder / 'run'), *words])

    return run


DOORS = {
    'calibrate': lambda bad, f: calibrate.main(
        [str(config(f)), str(bad), '--out', str(f / 'out.pth')]
    ),
    'test': lambda bad, f: TEST.main(
        [str(config(f)), str(bad), '--work-dir', str(f / 'run')]  # yapf: disable
    ),
    'export': lambda bad, f: export_onnx.main([str(config(f)), str(bad), '--out-dir', str(f)]),
    'convert': lambda bad, f: convert_checkpoint.main([str(bad), '--out', str(f / 'out.pth')]),
    'publish': lambda bad, f: publish_checkpoint.main([str(bad), '--out', str(f / 'out.pth')]),
    '--resume FILE': train('--resume', 'BAD'),
    'last_checkpoint': train('--resume'),
    'resume in the config': train(resume=True, load_from=str),
    'load_from': train(load_from=str),
    'load_from of QAT': train(load_from=str, custom_hooks=[dict(type='QATHook')]),
    'init_cfg': train(
        model=lambda bad: dict(
            type='Toy', init_cfg=dict(type='Pretrained', checkpoint=str(bad))
        ),
    ),
    'teacher': train(
        custom_hooks=lambda bad: [
            dict(type='QATHook'),
            dict(type='DistillHook', checkpoint=str(bad), modules=dict(norm=1.0)),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('archive', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('name', DOORS)
def test_a_planted_checkpoint_runs_nothing(trained, tmp_path, monkeypatch, name, archive, place):
    good, start = trained
    (tmp_path / 'int8.pth').symlink_to(start / 'int8.pth')
    mark, bad = tmp_path / 'exploded', tmp_path / 'bad.pth'
    torch.save(plant(good, Bomb(mark), place), bad, _use_new_zipfile_serialization=archive)
    heard = []
    monkeypatch.setattr(door, 'print_log', lambda text, **how: heard.append(text))
    try:
        DOORS[name](bad, tmp_path)
    except (QuantError, ValueError) as err:  # the toy is no BEVFusion to convert or export
        heard.append(str(err))
    assert not mark.exists()
    told = '\n'.join(heard)
    assert 'bad.pth' in told
    remedies = ('save ', 'save it without them', 'load_from=')
    assert any(remedy in told for remedy in remedies), told


@pytest.mark.parametrize('archive', [True, False])
@pytest.mark.parametrize('place', PLACES)
def test_the_payload_is_live(trained, tmp_path, archive, place):
    """So the test above can fail."""
    mark, bad = tmp_path / 'exploded', tmp_path / 'bad.pth'
    torch.save(plant(trained[0], Bomb(mark), place), bad, _use_new_zipfile_serialization=archive)
    torch.load(bad, weights_only=False)
    assert mark.exists()


def test_attributes_of_classes_are_not_set(tmp_path):
    """A pickle can also change a class for the whole process, without calling anything."""
    path = tmp_path / 'setter.pkl'
    path.write_bytes(
        b'\x80\x02ctorch._utils\n_rebuild_tensor\nN}X\x06\x00\x00\x00stolenK\x01s\x86b.'
    )
    pickle.loads(path.read_bytes())
    assert torch._utils._rebuild_tensor.stolen == 1  # as pickle does it
    del torch._utils._rebuild_tensor.stolen
    with pytest.raises(pickle.UnpicklingError, match='sets attributes'):
        door.load_plain(path)
    assert not hasattr(torch._utils._rebuild_tensor, 'stolen')


def test_a_program_is_no_checkpoint(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / 'script.pth')
    with pytest.raises(CheckpointError, match='script.pth is a TorchScript archive.*save'):
        read_checkpoint(tmp_path / 'script.pth')


def test_the_config_text_in_a_checkpoint_is_not_run(trained, tmp_path):
    """mmengine runs ``meta['config']`` when it resumes."""
    good, start = trained
    data = dict(good, meta=dict(good['meta'], config=f"open({str(tmp_path / 'ran')!r}, 'w')"))
    torch.save(data, tmp_path / 'c.pth')
    (tmp_path / 'int8.pth').symlink_to(start / 'int8.pth')
    train('--resume', 'BAD')(tmp_path / 'c.pth', tmp_path)
    assert (tmp_path / 'run/epoch_2.pth').exists() and not (tmp_path / 'ran').exists()


def test_what_a_training_saves_is_read_whole(trained, tmp_path):
    """Log buffers, arrays, NumPy scalars and sets come back as they were."""
    data = dict(trained[0])
    buffer = HistoryBuffer([1.0, 2.0, 4.0], [1, 1, 2])
    info = OrderedDict(palette=np.arange(6).reshape(2, 3), loss=np.float64(0.1), seen={1, 2})
    keys = dict(loss=True, palette=True, seen=True)
    scalars = OrderedDict({'train/loss': buffer})
    data['message_hub'] = dict(log_scalars=scalars, runtime_info=info, resumed_keys=keys)
    torch.save(data, tmp_path / 'c.pth')
    there = read_training(tmp_path / 'c.pth')
    found = there['message_hub']['log_scalars']['train/loss']
    assert type(found) is HistoryBuffer and found.mean() == buffer.mean()
    found.update(8.0)
    assert found.current() == 8.0 and found.statistics('max') == 8.0
    info = there['message_hub']['runtime_info']
    assert (info['palette'] == np.arange(6).reshape(2, 3)).all() and info['seen'] == {1, 2}
    for here, was in zip(there['optimizer']['state'].values(), data['optimizer']['state'].values()):
        assert all(torch.equal(here[k], was[k]) for k in was)


def test_a_resumed_training_ends_as_an_uninterrupted_one(trained, tmp_path):
    _, start = trained
    (tmp_path / 'int8.pth').symlink_to(start / 'int8.pth')
    path = str(config(tmp_path, epochs=2))

    def run(name, *words, epochs=2):  # logs of one experiment are shared in a process
        options = [f'experiment_name={name}{epochs}', f'train_cfg.max_epochs={epochs}']
        TRAIN.main([path, '--work-dir', str(tmp_path / name), *words, '--cfg-options', *options])

    run('whole')
    run('cut', epochs=1)
    run('cut', '--resume')
    whole, cut = (read_training(tmp_path / f'{name}/epoch_2.pth') for name in ('whole', 'cut'))
    assert all(torch.equal(whole['state_dict'][k], v) for k, v in cut['state_dict'].items())
    logs, ours = (c['message_hub']['log_scalars'] for c in (whole, cut))
    for key in [key for key in logs if 'time' not in key]:
        assert logs[key].data[0].tolist() == ours[key].data[0].tolist()


def test_resuming_says_what_it_lacks(trained, tmp_path):
    _, start = trained
    with pytest.raises(CheckpointError, match="no message_hub.*set load_from='.*int8.pth'"):
        read_training(start / 'int8.pth')
    torch.save(dict(trained[0], meta=None), tmp_path / 'bare.pth')
    with pytest.raises(CheckpointError, match='bare.pth has no meta.epoch'):
        read_training(tmp_path / 'bare.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_9.pth'))
    with pytest.raises(
        CheckpointError, match='last_checkpoint names .*epoch_9.pth, which does not'
    ):
        door.latest(tmp_path)


def test_resume_without_a_checkpoint_starts_from_load_from(trained, tmp_path):
    """mmengine would forget ``load_from``, and a QAT run begin without ranges."""
    _, start = trained
    (tmp_path / 'int8.pth').symlink_to(start / 'int8.pth')
    path = config(tmp_path, custom_hooks=[dict(type='QATHook')])
    TRAIN.main([str(path), '--work-dir', str(tmp_path / 'run'), '--resume'])
    assert (tmp_path / 'run/epoch_1.pth').exists()


def test_every_scheme_of_mmengine_is_the_one_door(monkeypatch, tmp_path):
    door.use_one_door()
    assert set(CheckpointLoader._schemes.values()) == {door.load_from_one_door}
    state = torch.nn.Linear(2, 2).state_dict()
    torch.save(dict(state_dict=state), tmp_path / 'away.pth')
    url = (tmp_path / 'away.pth').as_uri()
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(door.mmengine_checkpoint, 'get_torchvision_models', lambda: dict(net=url))
    model = torch.nn.Linear(2, 2)
    mmengine_load(model, 'torchvision://net')
    assert torch.equal(model.weight, state['weight'])
    torch.save(Bomb(tmp_path / 'exploded'), tmp_path / 'hub/checkpoints/away.pth')
    with pytest.raises(CheckpointError, match='posix.system, which is not read'):
        mmengine_load(model, 'torchvision://net')
    assert not (tmp_path / 'exploded').exists()
    with pytest.raises(CheckpointError, match='torchvision has no such model'):
        mmengine_load(model, 'torchvision://other')
    with pytest.raises(CheckpointError, match='download the file'):
        mmengine_load(model, 'pavi://net')


def test_a_damaged_zip_is_told(tmp_path):
    torch.save(dict(state_dict=Toy().state_dict()), tmp_path / 'c.pth')
    with zipfile.ZipFile(tmp_path / 'c.pth') as whole, zipfile.ZipFile(
        tmp_path / 'd.pth', 'w'
    ) as part:
        for entry in whole.namelist()[:-3]:
            part.writestr(entry, whole.read(entry))
    with pytest.raises(CheckpointError, match='d.pth is truncated or damaged'):
        read_checkpoint(tmp_path / 'd.pth')
