"""tools/train.py and tools/test.py on a tiny data set: training, resuming, scores, bad input."""

import importlib.util
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config

from mmdet3d_quant import UncalibratedError
from mmdet3d_quant.data.nuscenes import DatasetError
from mmdet3d_quant.files.checkpoint import CheckpointError, load_plain, read_checkpoint
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.from_config import ConfigError
from tests.small import ROOT, free_port

sys.path.insert(0, str(ROOT / 'tools'))
import calibrate  # noqa: E402
import publish_checkpoint  # noqa: E402

from tests.tools.tiny import TEST, TRAIN, write_config

FUSION = ROOT / 'checkpoints/bevfusion_tiny_lidar-cam_synthetic.pth'


@pytest.fixture(scope='module')
def work(tmp_path_factory, tiny_nuscenes):
    """Folder with a config, and a run of two epochs in ``run``."""
    folder = tmp_path_factory.mktemp('train')
    write_config(folder / 'lidar.py', 'bevfusion_tiny_lidar_synthetic', tiny_nuscenes)
    TRAIN.main([str(folder / 'lidar.py'), '--work-dir', str(folder / 'run')])
    return folder


def weights(path):
    return read_checkpoint(path)['state_dict']


def test_training_moves_every_weight(work):
    first, last = weights(work / 'run/epoch_1.pth'), weights(work / 'run/epoch_2.pth')
    cfg = fc.read_config(work / 'lidar.py')
    trained = {n for n, p in fc.build_model(cfg).named_parameters() if p.requires_grad}
    assert trained <= first.keys()
    assert [n for n in trained if torch.equal(first[n], last[n])] == []
    assert all(torch.isfinite(v).all() for v in last.values())


def test_resuming_ends_where_an_uninterrupted_run_does(work):
    again = work / 'again'
    again.mkdir()
    shutil.copy(work / 'run/epoch_1.pth', again)
    TRAIN.main(
        [str(work / 'lidar.py'), '--work-dir', str(again), '--resume', str(again / 'epoch_1.pth')]
    )
    wanted, found = weights(work / 'run/epoch_2.pth'), weights(again / 'epoch_2.pth')
    assert wanted.keys() == found.keys()
    assert [n for n in wanted if not torch.equal(wanted[n], found[n])] == []
    assert not (again / 'epoch_3.pth').exists()
    assert read_checkpoint(again / 'epoch_2.pth')['meta']['epoch'] == 2


def test_scores_are_those_of_mmdet3ds_own_tool(work):
    """On a published checkpoint: with torch 2.6, mmengine no more reads what it saves itself."""
    weights = str(work / 'published.pth')
    publish_checkpoint.main([str(work / 'run/epoch_2.pth'), '--out', weights])
    ours = TEST.main([str(work / 'lidar.py'), weights, '--work-dir', str(work / 'test')])
    mim = importlib.util.find_spec('mmdet3d').submodule_search_locations[0] + '/.mim'
    out = subprocess.run(
        [sys.executable, f'{mim}/tools/test.py', str(work / 'lidar.py')]
        + [weights, '--work-dir', str(work / 'stock')],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    key = 'NuScenes metric/pred_instances_3d_NuScenes/NDS'
    assert f'{key}: {ours[key]:.4f}' in out.stdout + out.stderr


@pytest.mark.slow
def test_quantized_checkpoints_score_as_int8_and_as_float(work, tiny_nuscenes):
    config = write_config(
        work / 'int8.py', 'bevfusion_tiny_lidar-cam_int8_synthetic', tiny_nuscenes
    )
    torch.manual_seed(0)
    model = fc.build_model(fc.read_config(config))
    float_checkpoint = work / 'fusion.pth'
    state = model.state_dict()
    for name in [n for n in state if n.endswith('_amax')]:
        del state[name]
    torch.save(dict(state_dict=state, meta={}), float_checkpoint)
    with pytest.raises(UncalibratedError):
        TEST.main([str(config), str(float_checkpoint), '--work-dir', str(work / 'test')])
    int8 = work / 'int8.pth'
    calibrate.main([str(config), str(float_checkpoint), '--out', str(int8)])
    as_int8, as_float, float_ = (
        TEST.main([str(config), str(checkpoint), *flags, '--work-dir', str(work / 'test')])
        for checkpoint, flags in ((int8, []), (int8, ['--float']), (float_checkpoint, ['--float']))
    )
    assert as_float == pytest.approx(float_, nan_ok=True)
    assert as_int8.keys() == as_float.keys()


@pytest.fixture(scope='module')
def qat(work, tiny_nuscenes):
    """A QAT config, in ``qat.py``, and a checkpoint that it starts from, ``int8.pth``."""
    path = write_config(work / 'qat.py', 'bevfusion_tiny_lidar-cam_qat_synthetic', tiny_nuscenes)
    start = work / 'start.pth'
    calibrate.main([str(path), str(FUSION), '--out', str(start), '--method', 'max'])
    cfg = Config.fromfile(path)
    cfg.load_from = cfg.custom_hooks[1].checkpoint = str(start)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=5)
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=1e-3)
    cfg.param_scheduler = None
    cfg.dump(path)
    return path


def test_qat_needs_a_calibrated_start(qat, work):
    args = [str(qat), '--work-dir', str(work / 'bad'), '--cfg-options']
    with pytest.raises(UncalibratedError, match=r'tools/calibrate\.py'):
        TRAIN.main([*args, f'load_from={FUSION}'])
    with pytest.raises(ConfigError, match='load_from'):
        TRAIN.main([*args, 'load_from=None'])
    with pytest.raises(CheckpointError, match='another architecture'):
        TRAIN.main([*args, f'load_from={work / "run/epoch_1.pth"}'])
    assert not (work / 'bad').exists()


@pytest.mark.slow
def test_two_processes_train_bevfusion_like_one(qat, work):
    """The same global batch; losses are normalised over both processes."""
    alone, two = work / 'alone', work / 'two'
    # In float: rounding makes much of the last bit. tests/qat/ quantizes, on a small model.
    cfg = Config.fromfile(qat)
    cfg.custom_hooks[0].schedule = {'0': {'*': 'float'}}
    for step in cfg.train_dataloader.dataset.pipeline:
        if step.type == 'ImageAug3D':  # each process draws its own
            step.update(resize_lim=[0.5, 0.5], rot_lim=[0.0, 0.0], rand_flip=False)
    cfg.dump(work / 'smooth.py')
    command = [sys.executable, '-m', 'torch.distributed.run', '--master-port', free_port()]
    for folder, count in ((alone, 1), (two, 2)):
        out = subprocess.run(
            [
                *command,
                '--nproc-per-node',
                str(count),
                str(ROOT / 'tools/train.py'),
                str(work / 'smooth.py'),
            ]
            + ['--launcher', 'pytorch', '--work-dir', str(folder)]
            + ['--cfg-options', f'train_dataloader.batch_size={2 // count}'],
            capture_output=True,
            text=True,
        )
        assert out.returncode == 0, out.stderr[-3000:]
    begun, wanted, found = (
        weights(path) for path in (work / 'start.pth', alone / 'epoch_1.pth', two / 'epoch_1.pth')
    )
    trained = [n for n, p in fc.build_model(fc.read_config(qat)).named_parameters()]

    def apart(a, b):
        return sum((a[n] - b[n]).double().square().sum().item() for n in trained) ** 0.5

    assert 0 < apart(wanted, begun)
    assert apart(wanted, found) < 1e-3 * apart(wanted, begun)


@pytest.mark.slow
def test_bfloat16_trains_on_a_cpu(work):
    run = work / 'bf16'
    TRAIN.main(
        [str(work / 'lidar.py'), '--work-dir', str(run), '--amp']
        + ['--cfg-options', 'train_cfg.max_epochs=1']
    )
    found, wanted = weights(run / 'epoch_1.pth'), weights(work / 'run/epoch_1.pth')
    name = 'pts_backbone.blocks.0.0.weight'
    assert found[name].dtype == torch.float32
    assert 0 < (found[name] - wanted[name]).abs().max() < 0.05


@pytest.mark.parametrize(
    'args, error, message',
    [
        (['--cfg-options', 'train_dataloader=None'], ConfigError, 'has no train_dataloader'),
        (['--resume', 'nowhere.pth'], CheckpointError, 'nowhere.pth does not exist'),
        (['--auto-scale-lr'], ConfigError, 'base_batch_size'),
        (['--amp', '--cfg-options', 'optim_wrapper.type=Odd'], ConfigError, 'Odd'),
        (
            ['--cfg-options', 'train_dataloader.dataset.data_root=nowhere'],
            DatasetError,
            'nowhere does not exist',
        ),
        (
            ['--cfg-options', 'train_dataloader.dataset.metainfo.version=v1.0-trainval'],
            DatasetError,
            'v1.0-trainval is not among its versions',
        ),
    ],
)
def test_bad_input_is_told_before_training(work, args, error, message):
    with pytest.raises(error, match=message):
        TRAIN.main([str(work / 'lidar.py'), '--work-dir', str(work / 'bad'), *args])
    assert not (work / 'bad').exists()


def test_missing_data_are_told_alike(work, tmp_path):
    """Each tool names the folder and what makes one, in one line."""
    gone = str(tmp_path / 'gone')
    names = ('train_dataloader', 'test_dataloader', 'calib_dataloader')
    options = ['--cfg-options', *(f'{name}.dataset.data_root={gone}' for name in names)]
    config, weights = str(work / 'lidar.py'), str(work / 'run/epoch_2.pth')
    run = ['--work-dir', str(tmp_path / 'run')]
    calls = {
        TRAIN: [config, *run],
        TEST: [config, weights, *run],
        calibrate: [config, weights, '--out', str(tmp_path / 'out.pth')],
    }
    for tool, args in calls.items():
        with pytest.raises(DatasetError, match=f'{gone} does not exist.*make_synthetic_nuscenes'):
            tool.main([*args, *options])
    assert list(tmp_path.iterdir()) == []
    script = [sys.executable, str(ROOT / 'tools/train.py')]
    result = subprocess.run([*script, *calls[TRAIN], *options], capture_output=True, text=True)
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f'error: {gone} does not exist')


def test_a_checkpoint_is_looked_at_before_the_data(work, tmp_path):
    """Whichever is wrong with both."""
    (tmp_path / 'bad.pth').write_text('<html>')
    bad = str(tmp_path / 'bad.pth')
    names = ('train_dataloader', 'test_dataloader', 'calib_dataloader')
    options = ['--cfg-options', *(f'{name}.dataset.data_root=nowhere' for name in names)]
    config, run = str(work / 'lidar.py'), ['--work-dir', str(tmp_path / 'run')]
    for tool, args in (
        (TRAIN, [config, *run, *options, f'load_from={bad}']),
        (TRAIN, [config, *run, '--resume', bad, *options]),
        (TEST, [config, bad, *run, *options]),
        (calibrate, [config, bad, '--out', str(tmp_path / 'out.pth'), *options]),
    ):
        with pytest.raises(CheckpointError, match='bad.pth'):
            tool.main(args)


def test_data_without_objects_are_refused_at_once(work, tmp_path):
    """The loader would draw frames a thousand times."""
    root = Config.fromfile(work / 'lidar.py').train_dataloader.dataset.data_root
    infos = load_plain(f'{root}/nuscenes_infos_train.pkl')
    for frame in infos['data_list']:
        frame['instances'] = []
    bare = f'{root}/bare.pkl'
    with open(bare, 'wb') as file:
        pickle.dump(infos, file)
    option = 'train_dataloader.dataset.ann_file=bare.pkl'
    args = [str(work / 'lidar.py'), '--work-dir', str(tmp_path / 'run'), '--cfg-options', option]
    with pytest.raises(DatasetError, match=r'bare.pkl has no objects in \d+ frame'):
        TRAIN.main(args)


def test_the_rest_of_bad_input(work):
    with pytest.raises(ConfigError, match='does not exist'):
        TRAIN.main(['nowhere.py'])
    with pytest.raises(CheckpointError, match='nowhere.pth'):
        TEST.main([str(work / 'lidar.py'), 'nowhere.pth', '--work-dir', str(work / 'bad')])
    with pytest.raises(ValueError, match='--task'):
        TEST.main([str(work / 'lidar.py'), str(work / 'run/epoch_2.pth'), '--show-dir', 'x'])


@pytest.mark.parametrize('name', ['train', 'test', 'make_synthetic_nuscenes', 'lint_onnx'])
def test_help_has_examples(name):
    out = subprocess.run(
        [sys.executable, str(ROOT / f'tools/{name}.py'), '--help'], capture_output=True, text=True
    )
    assert out.returncode == 0 and 'examples:' in out.stdout
