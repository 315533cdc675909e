"""tools/sensitivity.py: its table, its exit code, and what it refuses."""

import sys

import pytest
import torch

from mmdet3d_quant.core.modes import kept_float
from mmdet3d_quant.runs import from_config as fc
from tests.sensitivity.toy import write
from tests.small import ROOT

sys.path.insert(0, str(ROOT / 'tools'))
import sensitivity  # noqa: E402

FEW = [
    '--frames=2',
    '--probes=2',
    '--alone=1',
    '--box-frames=2',
    '--check-frames=2',
    '--device=cpu',
]
SPOILT = 'backbone.blocks.2.conv2'


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tool')
    write(folder, outlier=SPOILT)
    return folder


def run(work, name, *options):
    words = [str(work / 'toy.py'), str(work / 'int8.pth'), '--out', str(work / name)]
    return sensitivity.main([*words, *FEW, *options])


def test_it_tells_the_worst_and_what_it_wrote(work, capsys):
    assert run(work, 'block', '--unit=block', '--measure=1', '--least-sqnr=25') == 0
    text = capsys.readouterr().out
    assert 'backbone.blocks.2' in text and '±' in text and 'units float' in text
    model = fc.build_model(fc.read_config(work / 'block.py'))
    assert f'{SPOILT}._weight_quantizer' in kept_float(model)


def test_a_limit_that_does_not_hold_is_an_exit_code(work, capsys):
    assert run(work, 'tight', '--least-sqnr=200', '--max-latency=1.01') == 1
    assert 'limits do not hold' in capsys.readouterr().out


def test_overrides_of_the_model_cannot_be_written(work):
    with pytest.raises(ValueError, match='would be missing'):
        run(work, 'own', '--max-drop=1', '--cfg-options', 'model.skip=backbone.left')
    assert not (work / 'own.partial').exists()


@pytest.mark.slow
def test_a_tiny_bevfusion_gets_a_config_of_its_own(tmp_path, tiny_nuscenes):
    from mmdet3d_quant.core.modes import float_state_dict
    from mmdet3d_quant.jobs.calibration import calibrate_checkpoint
    from tests.tools.tiny import write_config

    config = tmp_path / 'int8.py'
    write_config(config, 'bevfusion_tiny_lidar-cam_int8_synthetic', tiny_nuscenes)
    torch.manual_seed(0)
    state = float_state_dict(fc.build_model(fc.read_config(config)))
    torch.save(dict(state_dict=state), tmp_path / 'float.pth')
    int8 = tmp_path / 'int8.pth'
    calibrate_checkpoint(config, tmp_path / 'float.pth', int8, num_batches=1, device='cpu')
    words = [str(config), str(int8), '--out', str(tmp_path / 'mixed'), '--unit=block']
    few = ['--frames=1', '--probes=1', '--alone=1', '--box-frames=1', '--check-frames=1']
    code = sensitivity.main([*words, *few, '--device=cpu', '--max-latency=1.1'])
    model = fc.build_model(fc.read_config(tmp_path / 'mixed.py'))
    fc.load_weights(model, int8, calibrated=True)
    assert code == 0 and kept_float(model)
