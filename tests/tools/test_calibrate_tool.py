"""tools/calibrate.py: interrupted, in several processes, with warnings, until stable."""

import copy
import json
import pickle
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from mmengine.config import Config

from mmdet3d_quant import CalibrationError
from mmdet3d_quant.calibration import ResumeError, observe
from mmdet3d_quant.data.samples import make_frame
from mmdet3d_quant.files.checkpoint import read_checkpoint
from mmdet3d_quant.jobs import calibration as job
from mmdet3d_quant.jobs.steps import RECIPES, STEPS
from mmdet3d_quant.runs.from_config import ConfigError
from mmdet3d_quant.runs.listener import Listener
from tests.small import ROOT, free_port, save_float, small_config

sys.path.insert(0, str(ROOT / 'tools'))
import calibrate  # noqa: E402

from mmdet3d_quant.core.compat import strict_zip

COUNT = 6
KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tools!r}]
import calibrate
from mmdet3d_quant.calibration import observe, resume
resume.INTERVAL = 0.0
forward, seen = observe.run, []
def killed(model, batch):
    if len(seen) == {at} + 1:  # the first batch is run once more, before it is observed
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(1)
    return forward(model, batch)
observe.run = killed
calibrate.main({argv!r})
"""


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A config with six different frames, float weights, and a calibrated checkpoint."""
    folder = tmp_path_factory.mktemp('calibrate')
    small_config(make_frame(folder / 'frame'), folder / 'int8.py')
    save_float(folder / 'int8.py', folder / 'float.pth')
    path = folder / 'frame/frame.pkl'
    info = pickle.loads(path.read_bytes())
    frames = [copy.deepcopy(info['data_list'][0]) for _ in range(COUNT)]
    for i, frame in enumerate(frames):  # the same images from other cameras are other data
        frame['sample_idx'] = i
        paths = [image['img_path'] for image in frame['images'].values()]
        for image, file in strict_zip(frame['images'].values(), paths[i:] + paths[:i]):
            image['img_path'] = file
    path.write_bytes(pickle.dumps(dict(info, data_list=frames)))
    calibrate.main(arguments(folder, folder / 'whole.pth'))
    return folder


def arguments(work, out, *more):
    return [str(a) for a in (work / 'int8.py', work / 'float.pth', '--out', out, *more)]


def equal(one, other):
    ours, theirs = (read_checkpoint(path)['state_dict'] for path in (one, other))
    assert ours.keys() == theirs.keys() and any(k.endswith('_amax') for k in ours)
    return all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(
    'at', [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4, 5))]
)
def test_killed_at_any_batch_it_goes_on_to_the_same_result(at, work, tmp_path):
    out = tmp_path / 'out.pth'
    script = KILLED.format(
        root=str(ROOT), tools=str(ROOT / 'tools'), at=at, argv=arguments(work, out)
    )
    killed = subprocess.run([sys.executable, '-c', script], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists() and (tmp_path / 'out.pth.partial/rank0.pth').is_file()
    with pytest.raises(ResumeError, match='--resume'):
        calibrate.main(arguments(work, out))
    calibrate.main(arguments(work, out, '--resume'))
    assert equal(out, work / 'whole.pth')
    assert not (tmp_path / 'out.pth.partial').exists()


def test_ctrl_c_saves_whatever_the_clock_says(work, tmp_path, monkeypatch, capsys):
    out, forward, seen = tmp_path / 'out.pth', observe.run, []

    def interrupted(model, batch):
        if len(seen) == 4 + 1:  # as above
            raise KeyboardInterrupt
        seen.append(1)
        return forward(model, batch)

    monkeypatch.setattr(observe, 'run', interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate.main(arguments(work, out))
    monkeypatch.setattr(observe, 'run', forward)
    capsys.readouterr()
    calibrate.main(arguments(work, out, '--resume', '--method', 'mse'))
    assert 'Going on after 4 batches' in capsys.readouterr().out
    assert equal(out, work / 'whole.pth')


@pytest.mark.parametrize(
    'count, method',
    [(2, 'auto'), *(pytest.param(4, m, marks=pytest.mark.slow) for m in ('auto', 'mse'))],
)
def test_several_processes_find_the_ranges_of_one(count, method, work, tmp_path):
    one, many = tmp_path / 'one.pth', tmp_path / 'many.pth'
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun does; the last bit of sums depends on it
    calibrate.main(arguments(work, one, '--method', method))
    torch.set_num_threads(threads)
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', str(count)]
    launch += ['--master-port', free_port(), 'tools/calibrate.py']
    launch += arguments(work, many, '--method', method, '--launcher', 'pytorch')
    found = subprocess.run(launch, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert f'{count} processes' in flat(found.stdout) and found.stdout.count('Wrote') == 1
    assert equal(one, many)


def flat(text):
    """Text without the console's line breaks."""
    return ' '.join(text.split())


def test_auto_tells_what_won_and_holds_batches_out(work, tmp_path, capsys):
    calibrate.main(
        arguments(work, tmp_path / 'o.pth', '--method', 'max', '--method', 'img_neck=auto')
    )
    out = flat(capsys.readouterr().out)
    assert 'up to 5 of the batches' in out and '1 more held out' in out
    assert (tmp_path / 'o.html').is_file() and (tmp_path / 'o.json').is_file()
    with pytest.raises(ValueError, match='at least 2 batches'):
        calibrate.main(
            arguments(work, tmp_path / 'p.pth', '--method', 'auto', '--num-batches', '1')
        )


def test_until_stable_stops_early(work, tmp_path):
    out = tmp_path / 'o.pth'
    calibrate.main(arguments(work, out, '--until-stable', '0.9'))
    assert read_checkpoint(out)['meta']['calibration']['num_batches'] == 4


def test_evaluation_data_are_warned_of_and_with_strict_refused(work, tmp_path, capsys):
    out = tmp_path / 'o.pth'
    with pytest.raises(CalibrationError, match='evaluate.*--strict'):
        calibrate.main(arguments(work, out, '--strict'))
    assert not out.exists()
    capsys.readouterr()
    calibrate.main(arguments(work, out))
    assert 'warning' in capsys.readouterr().out


def test_the_config_holds_methods_and_the_command_line_overrides(work, tmp_path, capsys):
    options = ['--cfg-options', 'calibration.method=max', 'calibration.overrides.pts_neck=mse']
    methods = ['--method', 'pts_backbone=entropy', '--weights', 'mse']
    calibrate.main(arguments(work, tmp_path / 'o.pth', *methods, *options))
    expected = 'method max, pts_neck=mse, pts_backbone=entropy, weights=mse'
    assert expected in flat(capsys.readouterr().out)
    with pytest.raises(ConfigError, match='unknown entries speed'):
        calibrate.main(arguments(work, tmp_path / 'p.pth', '--cfg-options', 'calibration.speed=1'))
    with pytest.raises(ValueError, match='fits no activation quantizer'):
        calibrate.main(arguments(work, tmp_path / 'p.pth', '--method', 'head=max'))


def test_sparse_layers_are_reported_by_distance(work, tmp_path, capsys):
    """The LiDAR encoder quantizes by its type alone, from the same float checkpoint."""
    options = ['--cfg-options', 'model.pts_middle_encoder.type=QuantBEVFusionSparseEncoder']
    methods = ['--num-batches', '2', '--method', 'pts_middle_encoder=percentile:99.99']
    calibrate.main(arguments(work, tmp_path / 'o.pth', *methods, *options))
    told = flat(capsys.readouterr().out)
    assert 'Sparse layers near, middle, far: SQNR' in told and 'conv_input.0' in told
    facts = json.loads((tmp_path / 'o.json').read_text())
    chosen = {r['name']: r for r in facts['ranges'] if r['name'].startswith('pts_middle_encoder')}
    assert {r['method'] for r in chosen.values()} == {'percentile:99.99'}
    convs = sorted((r['order'], name) for name, r in chosen.items() if '.add.' not in name)
    assert [s['name'] for s in facts['strata']] == [name for _, name in convs]
    assert len(convs) > 10
    assert all(s['amax'] == chosen[s['name']]['amax'] for s in facts['strata'])
    assert all(sum(b['num_voxels'] for b in s['bands']) > 0 for s in facts['strata'])
    assert 'Near and far' in (tmp_path / 'o.html').read_text()
    assert json.loads((work / 'whole.json').read_text())['strata'] == []


class Heard(Listener):
    def __init__(self):
        self.notes, self.warnings, self.counts = [], [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)

    @contextmanager
    def counting(self, title, total, done=0):
        self.counts.append((total, done))
        yield self.counts.append


def test_python_calls_it_with_plain_arguments(work, tmp_path):
    heard, out = Heard(), tmp_path / 'o.pth'
    made = job.calibrate_checkpoint(work / 'int8.py', work / 'float.pth', out, listener=heard)
    assert equal(out, work / 'whole.pth') and made.page.is_file() and made.strata == []
    assert made.calibration.num_batches == COUNT
    assert heard.counts == [(COUNT, 0), *range(1, COUNT + 1)]
    assert 'up to 6 of the batches of calib_dataloader' in heard.notes[0]
    assert 'scores will flatter' in heard.warnings[0]
    assert heard.warnings[1].startswith('pts_middle_encoder stays float')
    facts = json.loads((tmp_path / 'o.json').read_text())
    assert facts['about']['warnings'] == heard.warnings[:2] and 'command' not in facts['about']


@pytest.mark.slow
def test_a_small_branch_is_told_with_the_option_that_scales_it(work, tmp_path):
    """The camera's map at 1 % of its size, which changes nothing in float."""
    weights = read_checkpoint(work / 'float.pth')['state_dict']
    norm, conv = 'view_transform.downsample.7', 'fusion_layer.0.weight'
    for name in (f'{norm}.weight', f'{norm}.bias'):
        weights[name].mul_(0.01)
    weights[conv][:, :16].mul_(100)
    torch.save(dict(state_dict=weights), tmp_path / 'damaged.pth')

    def run(source, out, **more):
        heard = Heard()
        job.calibrate_checkpoint(
            work / 'int8.py', source, out, num_batches=2, listener=heard, **more
        )
        return heard, read_checkpoint(out), json.loads(out.with_suffix('.json').read_text())

    heard, checkpoint, facts = run(tmp_path / 'damaged.pth', tmp_path / 'damaged_int8.pth')
    (warning,) = (w for w in heard.warnings if '--equalize-concats' in w)
    assert 'fusion_layer.0._input_quantizer' in warning
    assert facts['equalized'] is None and 'equalized' not in checkpoint['meta']
    heard, checkpoint, facts = run(tmp_path / 'damaged.pth', tmp_path / 'o.pth', equalize=True)
    assert not any('--equalize-concats' in w for w in heard.warnings)
    moves = {move['concat']: move for move in checkpoint['meta']['equalized']}
    assert [{k: m[k] for k in m if k != 'text'} for m in facts['equalized']['moves']] == (
        checkpoint['meta']['equalized']
    )
    factor = moves['fusion_layer']['factor']
    text = f'{norm} x {factor:g}, fusion_layer.0[:, 0:16] / {factor:g}'
    assert factor >= 4 and any(note.endswith(text) for note in heard.notes)
    assert text in (tmp_path / 'o.html').read_text()
    for move in moves.values():  # what it says is what was done, and nothing else
        for name in (f'{move["source"]}.weight', f'{move["source"]}.bias'):
            weights[name].mul_(move['factor'])
        for reader in move['readers']:
            first, last = reader['channels']
            weights[f'{reader["layer"]}.weight'][:, first:last].div_(move['factor'])
    assert all(torch.equal(checkpoint['state_dict'][name], weights[name]) for name in weights)


def test_processes_that_joined_before_are_refused(work, tmp_path, monkeypatch):
    """The samplers of the data set would split the batches, which the job does itself."""
    monkeypatch.setattr(job, 'is_distributed', lambda: True)
    with pytest.raises(ValueError, match='have joined already'):
        job.calibrate_checkpoint(work / 'int8.py', work / 'float.pth', tmp_path / 'o.pth')
    monkeypatch.undo()
    with pytest.raises(ValueError, match='num_batches must be at least 1'):
        job.calibrate_checkpoint('int8.py', 'float.pth', tmp_path / 'o.pth', num_batches=0)


def test_the_place_of_the_sensor_is_read_from_the_config():
    def config(**preprocessor):
        return Config(dict(model=dict(data_preprocessor=preprocessor)))

    kitti = dict(voxel_layer=dict(point_cloud_range=[0, -40, -3, 70.4, 40, 1]))
    nuscenes = dict(voxelize_cfg=dict(point_cloud_range=[-54, -54, -5, 54, 54, 3]))
    assert job.sensor_of(config(**kitti)) == (0, 0.5)
    assert job.sensor_of(config(**nuscenes)) == job.sensor_of(config()) == (0.5, 0.5)


def test_a_launcher_that_did_not_start_this_is_named(work, tmp_path, monkeypatch):
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="--launcher pytorch: 'RANK' is not in the environment"):
        calibrate.main(arguments(work, tmp_path / 'o.pth', '--launcher', 'pytorch'))


def test_every_step_is_an_option_and_help_tells_recipes(capsys):
    with pytest.raises(SystemExit):
        calibrate.main(['--help'])
    shown = capsys.readouterr().out
    for step in STEPS:
        assert f'[{step.option}' in shown
    for name, steps in RECIPES.items():
        assert f'{name:10}  {", ".join(steps)}' in shown
    args = calibrate.parse_args(
        'int8.py float.pth --out o.pth --recipe best --equalize-layers a --equalize-layers b '
        '--empty-cells'.split()
    )
    assert (args.recipe, args.equalize_layers, args.empty_cells) == ('best', ['a', 'b'], True)
    assert args.smooth == [] and args.equalize_concats is False


def test_a_recipe_from_the_command_line_and_a_step_of_the_config(work, tmp_path):
    """Of the recipe what serves the model; the float model of equalized layers is the same."""
    out = tmp_path / 'o.pth'
    config = tmp_path / 'steps.py'
    steps = "calibration = dict(steps=dict(bias_correction=['pts_backbone']))"
    config.write_text(f"_base_ = ['{work / 'int8.py'}']\n{steps}\n")
    _, *rest = arguments(work, out, '--recipe', 'fast', '--num-batches', '3')
    calibrate.main([str(config), *rest])
    meta = read_checkpoint(out)['meta']
    assert list(meta['steps']) == [
        'equalize_concats',
        'equalize_layers',
        'bias_correction',
    ]
    assert meta['steps']['bias_correction'] == ['*', 'pts_backbone'] and meta['bias_corrected']
    with pytest.raises(ConfigError, match="unknown step 'no_such'"):
        job.calibrate_checkpoint(
            work / 'int8.py', work / 'float.pth', tmp_path / 'p.pth', steps=dict(no_such=True)
        )
