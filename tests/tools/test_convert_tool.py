"""tools/convert_checkpoint.py: files in, files out, and what it says to bad ones."""

import sys

import pytest
import torch
from mmdet3d.apis import init_model

from mmdet3d_quant.core.modes import float_state_dict
from mmdet3d_quant.data.samples import make_frame
from mmdet3d_quant.files.checkpoint import CheckpointError, read_checkpoint
from mmdet3d_quant.files.outputs import sha256
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.conversion import ConversionError
from tests.runs.mit import same, to_mit_by_hand
from tests.small import ROOT, save_float, small_config

sys.path.insert(0, str(ROOT / 'tools'))
import calibrate  # noqa: E402
import convert_checkpoint  # noqa: E402


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """Folder with a config, a float checkpoint and, by hand, its mit-han-lab twin."""
    folder = tmp_path_factory.mktemp('convert')
    small_config(make_frame(folder / 'frame'), folder / 'int8.py')
    save_float(folder / 'int8.py', folder / 'float.pth')
    state = to_mit_by_hand(read_checkpoint(folder / 'float.pth')['state_dict'])
    optimizer = dict(state={0: dict(exp_avg=torch.ones(3))}, param_groups=[])
    meta = dict(epoch=6, mmdet_version='2.20.0')
    torch.save(dict(state_dict=state, optimizer=optimizer, meta=meta), folder / 'mit.pth')
    return folder


def run(*args):
    convert_checkpoint.main([str(a) for a in args])


def test_there_and_back_and_into_calibration(work, tmp_path, capsys):
    config = ('--config', work / 'int8.py')
    run(work / 'mit.pth', '--out', tmp_path / 'float.pth', *config)
    told = capsys.readouterr().out
    assert 'pts_middle_encoder' in told and 'rearranged' in told and 'left out' not in told
    checkpoint = torch.load(tmp_path / 'float.pth', weights_only=True)
    assert set(checkpoint) == {'state_dict', 'meta'}
    assert same_numbers(checkpoint['state_dict'], work / 'float.pth')
    meta = checkpoint['meta']
    assert meta['epoch'] == 6 and meta['conversion'] == dict(to='mmdet3d')
    assert meta['source_checkpoint'] == dict(name='mit.pth', sha256=sha256(work / 'mit.pth'))
    assert len(meta['dataset_meta']['classes']) == 10 and 'QuantResNet' in meta['cfg']

    run(tmp_path / 'float.pth', '--out', tmp_path / 'mit.pth', '--to', 'mit', *config)
    back = read_checkpoint(tmp_path / 'mit.pth')['state_dict']
    assert same(back, read_checkpoint(work / 'mit.pth')['state_dict'])

    paths = (work / 'int8.py', tmp_path / 'float.pth', '--out', tmp_path / 'int8.pth')
    calibrate.main([str(p) for p in paths])
    model = fc.build_model(fc.read_config(work / 'int8.py'))
    fc.load_weights(model, tmp_path / 'int8.pth', calibrated=True)


def same_numbers(state, path):
    other = read_checkpoint(path)['state_dict']
    return set(state) == set(other) and all(torch.equal(v, other[n]) for n, v in state.items())


def test_mmdet3d_init_model_loads_what_mmdet3d_published(work, tmp_path):
    """Weights in spconv 2's layout without its version, as in mmdet3d's issue 2584."""
    state = dict(read_checkpoint(work / 'float.pth')['state_dict'])
    classes = fc.read_config(work / 'int8.py').class_names
    meta = dict(dataset_meta=dict(classes=classes))
    torch.save(dict(state_dict=state, meta=meta), tmp_path / 'published.pth')
    model = init_model(str(work / 'int8.py'), str(tmp_path / 'published.pth'), device='cpu')
    assert same_numbers(float_state_dict(model), work / 'float.pth')


def test_without_a_config_it_says_that_nothing_was_checked(work, tmp_path, capsys):
    run(work / 'mit.pth', '--out', tmp_path / 'float.pth')
    assert 'not checked against a model' in capsys.readouterr().out
    checkpoint = read_checkpoint(tmp_path / 'float.pth')
    assert same_numbers(checkpoint['state_dict'], work / 'float.pth')
    assert 'cfg' not in checkpoint['meta'] and checkpoint['meta']['versions']['torch']
    model = fc.build_model(fc.read_config(work / 'int8.py'))
    fc.load_weights(model, tmp_path / 'float.pth', calibrated=False)


def test_ranges_that_the_model_does_not_have_are_left_out(work, tmp_path, capsys):
    state = read_checkpoint(work / 'mit.pth')['state_dict']
    fuser, lidar = (
        f'{n}._input_quantizer._amax' for n in ('fuser.0', 'encoders.lidar.backbone.conv_input.0')
    )
    state.update({fuser: torch.tensor(2.0), lidar: torch.tensor(1.0)})
    torch.save(dict(state_dict=state), tmp_path / 'ptq.pth')
    run(tmp_path / 'ptq.pth', '--out', tmp_path / 'out.pth', '--config', work / 'int8.py')
    told = capsys.readouterr().out
    assert 'left out: pts_middle_encoder.conv_input.0._input_quantizer._amax' in told
    found = read_checkpoint(tmp_path / 'out.pth')['state_dict']
    ranges = {name: value for name, value in found.items() if name.endswith('_amax')}
    assert ranges == {'fusion_layer.0._input_quantizer._amax': torch.tensor(2.0)}
    paths = (tmp_path / 'out.pth', '--out', tmp_path / 'mit.pth', '--to', 'mit')
    run(*paths, '--config', work / 'int8.py')
    assert fuser in read_checkpoint(tmp_path / 'mit.pth')['state_dict']


class Bomb(torch.nn.Module):
    """Loading it would run its code."""

    def __setstate__(self, state):
        raise AssertionError('code of the pickle has run')


def as_whole_model(state):
    """Modules with such weights in a wrapper for several GPUs, as NVIDIA's ptq.py pickles them."""
    model = Bomb()
    for name, value in state.items():
        *path, last = name.split('.')
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, Bomb())
            module = module._modules[part]
        module.register_buffer(last, value)
    return torch.nn.DataParallel(model)


def test_a_model_pickled_whole_is_converted_without_its_code(work, tmp_path):
    state = read_checkpoint(work / 'mit.pth')['state_dict']
    torch.save(as_whole_model(state), tmp_path / 'whole.pth')
    run(tmp_path / 'whole.pth', '--out', tmp_path / 'float.pth', '--config', work / 'int8.py')
    found = read_checkpoint(tmp_path / 'float.pth')['state_dict']
    assert same_numbers(found, work / 'float.pth')


def test_bad_input_is_a_clear_error_and_writes_nothing(work, tmp_path):
    out = tmp_path / 'out.pth'
    good = read_checkpoint(work / 'mit.pth')['state_dict']

    def refused(error, match, change=None, *args, path=tmp_path / 'bad.pth'):
        if change is not None:
            torch.save(dict(state_dict=change(dict(good))), path)
        with pytest.raises(error, match=match):
            run(path, '--out', out, '--config', work / 'int8.py', *args)
        assert list(tmp_path.glob('out*')) == [], 'something was written'

    def without(name):
        return lambda state: {n: v for n, v in state.items() if n != name}

    refused(ConversionError, r'no place in mmdet3d:\n  odd.weight \(2,\)',
            lambda state: {**state, 'odd.weight': torch.zeros(2)})  # fmt: skip
    refused(ConversionError, r'fusion_layer.0.weight \(32, 48, 3, 3\) is missing',
            without('fuser.0.weight'))  # fmt: skip
    refused(ConversionError, r'\(5,\), expected \(32,\)',
            lambda state: {**state, 'fuser.1.bias': torch.zeros(5)})  # fmt: skip
    refused(ConversionError, 'names of mmdet3d already', path=work / 'float.pth')
    refused(ConversionError, 'names of mit already', None, '--to', 'mit', path=work / 'mit.pth')
    refused(CheckpointError, 'does not exist', path=tmp_path / 'no.pth')
    folded = {n: v for n, v in good.items() if 'decoder.backbone.blocks.0.1.' not in n}
    torch.save(as_whole_model(folded), tmp_path / 'ptq.pth')
    refused(ConversionError, r'norm is folded.*bevfusion_ptq.pth.*convert the float.*calibrate.py',
            path=tmp_path / 'ptq.pth')  # fmt: skip
    refused(fc.ConfigError, 'does not exist', None, '--config', 'no.py', path=work / 'mit.pth')
    with pytest.raises(OSError, match='cannot write'):
        run(work / 'mit.pth', '--out', '/dev/null/out.pth')


def test_the_help_shows_commands_that_exist(capsys):
    with pytest.raises(SystemExit):
        run('--help')
    told = capsys.readouterr().out
    assert 'bevfusion_ptq.pth' in told and '--to mit' in told
    config = told.split('CONFIG=')[1].split()[0]
    assert (ROOT / config).is_file()
