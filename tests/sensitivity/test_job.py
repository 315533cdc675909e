"""The whole job on a small detector: resumed, in processes, and the config that it writes."""

import json
from dataclasses import replace

import pytest
import torch
from mmengine.config import Config

import mmdet3d_quant as mq
from mmdet3d_quant.calibration import ResumeError
from mmdet3d_quant.core.decibels import decibels
from mmdet3d_quant.core.modes import kept_float
from mmdet3d_quant.core.quantizer import UncalibratedError
from mmdet3d_quant.jobs import bench_tasks
from mmdet3d_quant.jobs import sensitivity as job
from mmdet3d_quant.jobs.bench_tasks import Tasks
from mmdet3d_quant.jobs.mixed import Limits
from mmdet3d_quant.runs import from_config as fc
from tests.sensitivity.toy import batch_of, write

EFFORT = job.Effort(frames=2, probes=2, alone=1, measure=2, boxes=3, check=3)
SPOILT = 'backbone.blocks.2.conv2'


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sensitivity')
    write(folder, outlier=SPOILT)
    return folder


def analyse(work, name, **kwargs):
    kwargs = dict(dict(effort=EFFORT, device='cpu'), **kwargs)
    return job.analyse_sensitivity(work / 'toy.py', work / 'int8.pth', work / name, **kwargs)


def test_report_has_every_unit_and_the_spoilt_one_first(work):
    made = analyse(work, 'all')
    facts = json.loads((work / 'all.json').read_text())
    assert facts['units'] == made.facts['units'] and SPOILT in facts['units'][0]['members']
    noises = [u['noise'] for u in facts['units']]
    assert noises == sorted(noises, reverse=True)
    assert made.rows[0].gain > 0 and made.rows[0].map <= 101
    page = (work / 'all.html').read_text()
    assert all(u['name'] in page for u in facts['units'])
    assert not (work / 'all.partial').exists() and made.mixed is None


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(work, monkeypatch):
    whole = analyse(work, 'whole').facts
    add, done = job.Ledger.add, []

    def stopped(self, task, result):
        add(self, task, result)
        done.append(task)
        if len(done) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(job.Ledger, 'add', stopped)
    with pytest.raises(KeyboardInterrupt):
        analyse(work, 'stopped')
    monkeypatch.setattr(job.Ledger, 'add', add)
    with (work / 'stopped.partial').open('a') as file:
        file.write('{"task": "cut o')  # as a power cut leaves it
    with pytest.raises(ResumeError, match='--resume'):
        analyse(work, 'stopped')
    ran = []
    monkeypatch.setattr(
        'mmdet3d_quant.jobs.bench_tasks.perform',
        lambda bench, task, do=bench_tasks.perform: ran.append(task) or do(bench, task),
    )
    again = analyse(work, 'stopped', resume=True).facts
    assert again == whole
    assert not any(task in done for task in ran)


def test_results_of_another_checkpoint_are_refused(work, tmp_path):
    write(tmp_path, outlier=SPOILT)
    (tmp_path / 'other.partial').write_text('{"config": "another"}\n')
    with pytest.raises(ResumeError, match='of another run: its config'):
        analyse(tmp_path, 'other', resume=True)


@pytest.mark.slow
def test_two_processes_find_the_same(work):
    one = analyse(work, 'one', effort=replace(EFFORT, measure=0)).facts
    two = analyse(work, 'two', effort=replace(EFFORT, measure=0), processes=2).facts
    assert [u['name'] for u in two['units']] == [u['name'] for u in one['units']]
    assert [u['noise'] for u in two['units']] == pytest.approx(
        [u['noise'] for u in one['units']], rel=1e-5
    )


def test_the_written_config_builds_and_holds_what_it_says(work):
    before = torch.load(work / 'int8.pth')
    made = analyse(work, 'mixed', limits=Limits(sqnr=30.0))
    mixed = made.mixed
    assert mixed.problem == '' and mixed.path == work / 'mixed.py'
    assert SPOILT in mixed.units and len(mixed.units) < len(made.rows)
    assert all(torch.equal(v, before['state_dict'][k]) for k, v in
               torch.load(work / 'int8.pth')['state_dict'].items())  # fmt: skip
    # Built by nothing of the job: its config alone, and the checkpoint.
    cfg = Config.fromfile(work / 'mixed.py')
    model = fc.build_model(cfg)
    fc.load_weights(model, work / 'int8.pth', calibrated=True)
    floats = kept_float(model)
    members = {m for r in made.rows if r.unit.name in mixed.units for m in r.unit.members}
    assert floats and all('sensitivity: ' in reason for reason in floats.values())
    names = {n.rpartition('.')[0] if 'conv' in n or 'stem' in n else n for n in floats}
    assert {m for m in members if 'conv' in m} <= names
    noises = []
    for frame in range(9, 12):  # the last three, which the search did not see
        maps = []
        for mode in ('float', 'quant'):
            with mq.set_mode(model, mode), torch.no_grad():
                maps.append(model.backbone(torch.stack(batch_of(frame)['inputs'])).double())
        noises.append(((maps[1] - maps[0]).square().sum() / maps[0].square().sum()).item())
    assert mixed.unseen['noise'] == pytest.approx(sum(noises) / 3, rel=1e-4)
    assert decibels(1, mixed.unseen['noise']) > 30 > decibels(1, mixed.unseen['noise_int8'])
    # One unit less would not do on the frames that were searched.
    steps = [s['unit'] for s in made.facts['order'][: len(mixed.units)]]
    assert steps == list(mixed.units)


def test_a_drop_in_points_is_held_and_latency_bounds_it(work):
    made = analyse(work, 'drop', limits=Limits(drop=12.0))
    assert made.mixed.seen['drop'] <= 12.0 < made.mixed.unseen['drop_int8']
    tight = analyse(work, 'tight', limits=Limits(sqnr=90.0, latency=1.02)).mixed
    assert tight.total.seconds <= 1.02 * tight.before.seconds
    assert 'SQNR' in tight.problem  # said, not hidden


def test_nothing_is_written_where_nothing_is_needed(work):
    made = analyse(work, 'enough', limits=Limits(sqnr=-20.0))
    assert made.mixed.path is None and not made.mixed.problem
    assert not (work / 'enough.py').exists()


def test_what_a_config_skips_stays_skipped(work):
    cfg = Config.fromfile(work / 'toy.py')
    cfg.model = dict(type='Quantized', of='ToyDetector', skip=['backbone.left'])
    cfg.dump(work / 'skipping.py')
    made = job.analyse_sensitivity(
        work / 'skipping.py',
        work / 'int8.pth',
        work / 'child',
        effort=EFFORT,
        limits=Limits(sqnr=30.0),
        device='cpu',
    )
    model = fc.build_model(fc.read_config(work / 'child.py'))
    assert made.mixed.problem == ''
    assert 'backbone.left._weight_quantizer' in kept_float(model)
    assert f'{SPOILT}._weight_quantizer' in kept_float(model)


@pytest.mark.parametrize(
    'kwargs, error, text',
    [
        (dict(level='word'), ValueError, 'layer, block, part'),
        (dict(truth='me'), ValueError, 'float, labels'),
        (dict(processes=0), ValueError, 'processes'),
        (dict(effort=job.Effort(frames=99)), fc.ConfigError, '99 frames are needed.*has 12'),
        (
            dict(effort=job.Effort(frames=2, boxes=2, alone=1, check=11), limits=Limits(sqnr=1)),
            fc.ConfigError,
            '11 others to check on',
        ),
    ],
)
def test_bad_input_errs_before_long_work(work, monkeypatch, kwargs, error, text):
    monkeypatch.setattr(Tasks, 'run', lambda *args: pytest.fail('work has begun'))
    with pytest.raises(error, match=text):
        analyse(work, 'bad', **kwargs)


def test_a_checkpoint_without_ranges_and_a_config_that_is_there_are_refused(work, tmp_path):
    write(tmp_path, calibrate=False)
    with pytest.raises(UncalibratedError):
        analyse(tmp_path, 'none')
    (work / 'there.py').write_text('mine = 1\n')
    with pytest.raises(FileExistsError, match='--force'):
        analyse(work, 'there', limits=Limits(sqnr=1))
    assert (work / 'there.py').read_text() == 'mine = 1\n'


@pytest.mark.parametrize('kwargs', [{}, dict(drop=-1), dict(latency=0.9)])
def test_limits_that_make_no_sense_are_refused(kwargs):
    with pytest.raises(ValueError):
        Limits(**kwargs)


def test_effort_is_checked():
    with pytest.raises(ValueError, match='frames must be at least 1'):
        job.Effort(frames=0)


def test_labels_are_the_truth_if_asked_for(work):
    made = analyse(work, 'labels', truth='labels')
    assert made.facts['scores']['float'] < 50  # random weights do not find the box in the middle
