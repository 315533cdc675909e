"""The demo's parts: steps that are not done twice, boxes on disk, errors before long work."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.structures import InstanceData
from rich.console import Console

from mmdet3d_quant.data.boxes import load_boxes, save_boxes
from mmdet3d_quant.files.checkpoint import CheckpointError
from mmdet3d_quant.files.once import digest
from mmdet3d_quant.files.outputs import whole
from mmdet3d_quant.runs.paths import replace_start
from tests.small import ROOT

sys.path.insert(0, str(ROOT / 'tools'))
import demo  # noqa: E402
from terminal import Steps  # noqa: E402

from mmdet3d_quant.core.compat import strict_zip


@pytest.fixture
def steps(tmp_path):
    with open(tmp_path / 'log', 'w') as log:
        yield Steps(Console(file=log, width=200), 2)


class Maker:
    """Writes a file, or fails half way; counts how often it was asked."""

    def __init__(self, path):
        self.path, self.calls, self.fails = path, 0, False

    def __call__(self):
        self.calls += 1
        with whole(self.path) as part:
            part.write_text(f'made {self.calls}')
            if self.fails:
                raise KeyboardInterrupt


def test_a_step_is_done_once_for_the_same_key(steps, tmp_path):
    make = Maker(tmp_path / 'deep/er/file')
    for _ in range(3):
        steps.once(make.path, dict(a=1, b=[2]), make)
    assert make.calls == 1
    steps.once(make.path, dict(b=[2], a=1), make)  # the same in another order
    assert make.calls == 1
    steps.once(make.path, dict(a=1, b=[3]), make)
    steps.once(make.path, dict(a=1, b=[2]), make)  # the older file is gone
    assert make.calls == 3 and make.path.read_text() == 'made 3'


def test_interrupted_work_is_done_again_and_what_was_finished_stays(steps, tmp_path):
    first, second = Maker(tmp_path / 'first'), Maker(tmp_path / 'second')
    steps.once(first.path, dict(a=1), first)
    second.fails = True
    with pytest.raises(KeyboardInterrupt):
        steps.once(second.path, dict(a=1), second)
    assert not second.path.exists()
    second.fails = False
    for make in (first, second):
        steps.once(make.path, dict(a=1), make)
    assert (first.calls, second.calls) == (1, 2)


def test_work_that_was_interrupted_while_it_replaced_something_is_done_again(steps, tmp_path):
    """The key of before would be a lie about what lies there now."""
    path = tmp_path / 'file'

    def make(text, fails=False):
        path.write_text(text)
        if fails:
            raise KeyboardInterrupt

    steps.once(path, dict(a=1), lambda: make('one'))
    with pytest.raises(KeyboardInterrupt):
        steps.once(path, dict(a=2), lambda: make('two', fails=True))
    steps.once(path, dict(a=1), lambda: make('one'))
    assert path.read_text() == 'one'


@pytest.mark.parametrize('harm', ['remove', 'shorten', 'replace', 'add'])
def test_a_folder_that_was_changed_is_made_again(steps, tmp_path, harm):
    folder, calls = tmp_path / 'folder', []

    def make():
        calls.append(1)
        (folder / 'inner').mkdir(parents=True, exist_ok=True)
        for name in ('a', 'inner/b'):
            (folder / name).write_text('text')

    steps.once(folder, {}, make)
    steps.once(folder, {}, make)
    assert len(calls) == 1
    victim = folder / 'inner/b'
    if harm == 'remove':
        victim.unlink()
    elif harm == 'shorten':
        victim.write_text('t')
    elif harm == 'add':
        (folder / 'c').write_text('')
    else:
        time.sleep(0.02)
        victim.write_text('texd')
    steps.once(folder, {}, make)
    assert len(calls) == 2


def test_steps_are_numbered_and_only_whole_work_is_timed(steps, tmp_path):
    make = Maker(tmp_path / 'file')
    with steps.step('slow'):
        time.sleep(0.05)
        steps.once(make.path, {}, make)
    assert 0.05 <= steps.seconds['slow'] < 5
    with steps.step('reused'):
        steps.once(make.path, {}, make)
    assert list(steps.seconds) == ['slow']
    steps.console.file.flush()
    log = (tmp_path / 'log').read_text()
    assert '1/2 slow' in log and '2/2 reused' in log and f'Reusing {make.path}' in log


def test_the_digest_changes_with_the_code(tmp_path):
    (tmp_path / 'deep').mkdir()
    (tmp_path / 'deep/a.py').write_text('a = 1')
    (tmp_path / 'data.txt').write_text('x')
    before = digest([tmp_path])
    (tmp_path / 'data.txt').write_text('y')
    assert digest([tmp_path]) == before == digest([tmp_path / 'deep/a.py'])
    (tmp_path / 'deep/a.py').write_text('a = 2')
    changed = digest([tmp_path])
    (tmp_path / 'deep/a.py').rename(tmp_path / 'deep/b.py')
    assert len({before, changed, digest([tmp_path])}) == 3


def test_boxes_come_back_as_they_were(tmp_path):
    torch.manual_seed(0)
    results = []
    for index, count in ((3, 5), (1, 0)):
        found = InstanceData(
            bboxes_3d=LiDARInstance3DBoxes(torch.rand(count, 9), box_dim=9),
            scores_3d=torch.rand(count),
            labels_3d=torch.randint(10, (count,)),
        )
        results.append(dict(sample_idx=index, pred_instances_3d=found))
    save_boxes(results, tmp_path / 'boxes.pth')
    for before, after in strict_zip(results, load_boxes(tmp_path / 'boxes.pth')):
        assert before['sample_idx'] == after['sample_idx']
        one, other = before['pred_instances_3d'], after['pred_instances_3d']
        assert torch.equal(one.bboxes_3d.tensor, other.bboxes_3d.tensor)
        assert torch.equal(one.bboxes_3d.corners, other.bboxes_3d.corners)
        assert torch.equal(one.scores_3d, other.scores_3d)
        assert torch.equal(one.labels_3d, other.labels_3d)


def test_paths_of_a_config_move_and_nothing_else_does():
    before = dict(
        root='data/x/', deep=[dict(file='data/x/a.pkl'), ('data/y/', 3, None, 'my data/x/')]
    )
    after = dict(root='/n/', deep=[dict(file='/n/a.pkl'), ('data/y/', 3, None, 'my data/x/')])
    assert replace_start(before, 'data/x/', '/n/') == after


def refused(tmp_path, error, match, *args):
    """What the demo says to bad options, before it makes anything."""
    checkpoint = tmp_path / 'some.pth'
    checkpoint.write_bytes(b'')
    out = tmp_path / 'out'
    with pytest.raises(error, match=match):
        demo.main(['--work-dir', str(out), '--checkpoint', str(checkpoint), *args])
    assert not out.exists() or not [p for p in out.rglob('*') if p.is_file()]


@pytest.mark.parametrize(
    'error, match, args',
    [
        (ValueError, "unknown calibration method 'no_such_method'", ['--method', 'no_such_method']),
        (ValueError, 'multiple of block', ['--samples', '5']),
        (ValueError, 'multiple of block', ['--train-samples', '0']),
        (ValueError, 'pictures must not be negative', ['--pictures', '-1']),
        (CheckpointError, 'no.pth does not exist; name one', ['--checkpoint', 'no.pth']),
        (OSError, 'cannot write /dev/null', ['--work-dir', '/dev/null']),
        (CheckpointError, 'an empty file', []),
    ],
)
def test_bad_options_are_found_before_anything_is_made(tmp_path, error, match, args):
    refused(tmp_path, error, match, *args)


def test_a_checkpoint_of_another_model_is_found_before_data_are_made(tmp_path):
    torch.save(dict(state_dict=dict(weight=torch.ones(2))), tmp_path / 'other.pth')
    match = 'another architecture'
    refused(tmp_path, CheckpointError, match, '--checkpoint', str(tmp_path / 'other.pth'))


@pytest.mark.slow
def test_the_demo_from_start_to_report_and_again(tmp_path):
    from mmdet3d_quant.core.modes import float_state_dict
    from mmdet3d_quant.runs import from_config as fc

    torch.manual_seed(0)
    model = fc.build_model(fc.read_config(demo.CONFIG))
    torch.save(dict(meta={}, state_dict=float_state_dict(model)), tmp_path / 'float.pth')
    command = [sys.executable, 'tools/demo.py', '--samples', '2', '--train-samples', '2']
    command += ['--checkpoint', tmp_path / 'float.pth', '--work-dir', tmp_path / 'work']

    def run(*args):
        done = subprocess.run([*command, *args], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        assert Path(tmp_path / 'work/report/report.html').is_file()
        return done.stdout

    assert 'Reusing' not in run()
    assert run().count('Reusing') == 8
    changed = run('--method', 'max')
    assert changed.count('Reusing') == 2, 'only the data and the float boxes stay'
