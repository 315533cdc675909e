"""Files appear whole or not at all, and reading a checkpoint runs nothing from it."""

import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from mmdet3d_quant.files.checkpoint import CheckpointError, load_from_one_door, read_checkpoint
from mmdet3d_quant.files.outputs import check_writable, whole, whole_folder


def test_a_failure_leaves_the_old_file_and_no_trace(tmp_path):
    target = tmp_path / 'out.txt'
    target.write_text('old')
    with pytest.raises(RuntimeError), whole(target) as tmp:
        tmp.write_text('half')
        raise RuntimeError
    assert target.read_text() == 'old' and list(tmp_path.iterdir()) == [target]
    with whole(target) as tmp:
        tmp.write_text('new')
    assert target.read_text() == 'new' and list(tmp_path.iterdir()) == [target]


def test_a_failure_leaves_the_old_folder(tmp_path):
    folder = tmp_path / 'a' / 'b'
    with pytest.raises(RuntimeError), whole_folder(folder) as tmp:
        (tmp / 'one').write_text('1')
        raise RuntimeError
    assert list(folder.iterdir()) == []
    with whole_folder(folder) as tmp:
        (tmp / 'one').write_text('1')
    assert [p.name for p in folder.iterdir()] == ['one']


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='cannot write .*file/out.pth'):
        with whole(tmp_path / 'file/out.pth'):
            pass
    with pytest.raises(OSError, match='is a folder'), whole(tmp_path):
        pass


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path):
    target, link = tmp_path / 'disk/out.txt', tmp_path / 'out.txt'
    link.symlink_to(target)  # nothing is there yet
    for text in ('old', 'new'):
        with whole(link) as tmp:
            tmp.write_text(text)
        assert link.is_symlink() and target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_pipes_devices_and_loops_of_links_are_not_replaced(tmp_path):
    pipe, loop = tmp_path / 'pipe', tmp_path / 'loop'
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    for path, reason in ((pipe, 'device or a pipe'), (loop, '')):
        with pytest.raises(OSError, match=f'cannot write {path}: .*{reason}'), whole(path):
            pass
    assert pipe.is_fifo() and loop.is_symlink()
    with pytest.raises(OSError, match='device or a pipe'):
        check_writable('/dev/null')


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path):
    target = tmp_path / 'out.pth'
    target.write_text('old')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match='cannot write .*out.pth: the disk'), whole(target) as tmp:
            torch.save(torch.zeros(10000), tmp)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_text() == 'old' and list(tmp_path.iterdir()) == [target]


class Bomb:
    """Unpickling it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f'touch {self.path}',))


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    state = nn.Linear(2, 2).state_dict()
    bomb = Bomb(tmp_path / 'exploded')
    torch.save(dict(state_dict=state, optimizer=bomb), tmp_path / 'c.pth')
    read = read_checkpoint(tmp_path / 'c.pth')
    assert torch.equal(read['state_dict']['weight'], state['weight'])
    assert not (tmp_path / 'exploded').exists()
    with pytest.raises(AssertionError):  # the bomb is live: this test can fail
        torch.load(tmp_path / 'c.pth', weights_only=False)
        assert not (tmp_path / 'exploded').exists()


def test_a_checkpoint_of_the_mmengine_runner_is_read(tmp_path):
    """Its message hub holds objects that weights_only refuses."""
    hub = dict(log_scalars={'train/loss': HistoryBuffer([1.0], [1])}, lr=np.float64(0.1))
    state = nn.Linear(2, 2).state_dict()
    meta = dict(epoch=3, dataset_meta=dict(classes=('car',)), hook=HistoryBuffer([1.0], [1]))
    torch.save(dict(state_dict=state, message_hub=hub, meta=meta), tmp_path / 'epoch_3.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'epoch_3.pth', weights_only=True)
    read = read_checkpoint(tmp_path / 'epoch_3.pth')
    assert torch.equal(read['state_dict']['bias'], state['bias'])
    assert read['state_dict']._metadata == state._metadata
    assert read['meta'] == dict(epoch=3, dataset_meta=dict(classes=('car',)), hook=None)


def test_bare_state_dicts_are_read(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / 'c.pth')
    assert set(read_checkpoint(tmp_path / 'c.pth')['state_dict']) == {'weight', 'bias'}


def test_bad_checkpoints_are_named_with_the_reason(tmp_path):
    good, bad = tmp_path / 'good.pth', tmp_path / 'bad.pth'
    torch.save(dict(state_dict=nn.Linear(200, 200).state_dict()), good)

    def refused(match):
        with pytest.raises(CheckpointError, match=f'(?s)bad.pth.*{match}'):
            read_checkpoint(bad)

    refused('does not exist')
    bad.write_bytes(good.read_bytes()[:1000])
    refused('truncated')
    bad.write_text('not a checkpoint')
    refused('a text file')
    torch.save(nn.ReLU(), bad)
    refused('ReLU, which is not read')
    torch.save(dict(state_dict=dict(weight=3)), bad)
    refused("'weight' in the state_dict is no tensor")
    assert Path(good).exists()


@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_weights_that_are_not_finite_are_refused_and_open_ranges_are_not(tmp_path, value):
    state = {'conv.weight': torch.ones(3), 'conv._amax': torch.tensor(float('nan'))}
    torch.save(dict(state_dict=state), tmp_path / 'good.pth')
    assert len(read_checkpoint(tmp_path / 'good.pth')['state_dict']) == 2
    state['conv.weight'][1] = float(value)
    torch.save(dict(state_dict=state), tmp_path / 'bad.pth')
    for read in (read_checkpoint, lambda path: load_from_one_door(str(path), 'cpu')):
        with pytest.raises(CheckpointError, match='bad.pth: conv.weight holds NaN or infinity'):
            read(tmp_path / 'bad.pth')
