"""`type='Quantized'`: settings of quantization where a float type has none, through every door."""

import os
import subprocess
import sys

import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant import UncalibratedError
from mmdet3d_quant.core.modes import keep_float
from mmdet3d_quant.files.checkpoint import read_checkpoint
from mmdet3d_quant.runs import weights
from mmdet3d_quant.runs.from_config import build_model, read_config
from mmdet3d_quant.runs.weights import load_weights
from tests.qat.toy import QAT, Points, Toy, calibrated, runner
from tests.small import ROOT

NECK = dict(
    in_channels=[4, 4],
    out_channels=[4, 4],
    upsample_strides=[1, 2],
    upsample_cfg=dict(type='QuantConvTranspose2d', bias=False),
)
SKIP = {'b': 'measured: it costs a point'}
SETTINGS = dict(type='Quantized', of='Toy', skip=SKIP, learn_amax=True)


def test_the_model_is_that_of_the_type_with_the_settings():
    float_type = MODELS.build(dict(type='SECONDFPN', **NECK))
    model = MODELS.build(
        dict(type='Quantized', of='SECONDFPN', skip={'deblocks.0': 'why'}, learn_amax=True, **NECK)
    )
    assert type(model) is type(float_type)
    first, second = (model.deblocks[i][0] for i in (0, 1))
    assert first._input_quantizer.float_reason == first._weight_quantizer.float_reason == 'why'
    assert second._input_quantizer.learned and not second._weight_quantizer.learned
    assert second._input_quantizer.label == 'SECONDFPN: deblocks.1.0._input_quantizer'
    kept = {f'deblocks.0.0.{q}._amax' for q in ('_input_quantizer', '_weight_quantizer')}
    assert list(model.state_dict()) == [k for k in float_type.state_dict() if k not in kept]


def test_wrong_settings_are_told():
    with pytest.raises(ValueError, match="'deblock.0' matches no quantized layer of SECONDFPN"):
        MODELS.build(dict(type='Quantized', of='SECONDFPN', skip='deblock.0', **NECK))
    with pytest.raises(KeyError, match='SECONDFPM'):
        MODELS.build(dict(type='Quantized', of='SECONDFPM', **NECK))


def test_a_config_has_it_by_name_or_as_classes(tmp_path):
    texts = {
        'a.py': "model = dict(type='Quantized', of='Toy', skip=['b'])",
        'b.py': 'from mmengine.config import read_base\nfrom mmdet3d_quant.models import Quantized'
        "\nfrom tests.qat.toy import Toy\nmodel = dict(type=Quantized, of=Toy, skip=['b'])",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        cfg = read_config(tmp_path / name)
        again = Config.fromstring(cfg.pretty_text, '.py')
        for each in (cfg, again):
            assert build_model(each).b._input_quantizer.float_reason == "skip='b'"


RUNNER = """
import sys
from mmengine.config import Config
from mmengine.runner import Runner
cfg = Config.fromfile(sys.argv[1])
run = Runner.from_cfg(cfg)
assert run.model.img_neck.fpn_convs[0].conv._input_quantizer.float_reason == 'wide'
assert run.model.img_neck.lateral_convs[0].conv._input_quantizer.learned
assert type(run.model).__name__ == 'MVXFasterRCNN'
"""


def test_mmengines_runner_needs_the_import_alone(tmp_path):
    neck = "conv_cfg=dict(type='QuantConv2d')"
    (tmp_path / 'c.py').write_text(
        f"""
custom_imports = dict(imports=['mmdet3d_quant'])
default_scope = 'mmdet3d'
work_dir = {str(tmp_path)!r}
model = dict(type='Quantized', of='MVXFasterRCNN', skip={{'*fpn_convs*': 'wide'}}, learn_amax=True,
    img_neck=dict(type='mmdet.FPN', in_channels=[4, 8], out_channels=4, num_outs=2, {neck}))
"""
    )
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    script = [sys.executable, '-c', RUNNER, str(tmp_path / 'c.py')]
    ran = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_training_and_resuming_keep_it(tmp_path):
    """What is kept float stays so; the other ranges are learned and end as without the stop."""
    start = tmp_path / 'int8.pth'
    torch.manual_seed(0)
    model = MODELS.build(dict(SETTINGS))
    mq.calibrate(model, [Points().images])
    torch.save(dict(state_dict=model.state_dict(), meta=dict(macs={'a': 5})), start)
    runner(tmp_path / 'whole', start, [QAT], model=SETTINGS).train()
    runner(tmp_path / 'parts', start, [QAT], model=SETTINGS, epochs=1).train()
    first = str(tmp_path / 'parts/epoch_1.pth')
    runner(tmp_path / 'parts', first, [QAT], model=SETTINGS, resume=True).train()
    wanted, found = (read_checkpoint(tmp_path / d / 'epoch_2.pth') for d in ('whole', 'parts'))
    assert all(torch.equal(v, found['state_dict'][k]) for k, v in wanted['state_dict'].items())
    assert 'b._input_quantizer._amax' not in wanted['state_dict']
    begun = model.state_dict()['a._input_quantizer._amax']
    assert not torch.equal(wanted['state_dict']['a._input_quantizer._amax'], begun)
    reasons = {f'b.{q}': SKIP['b'] for q in ('_input_quantizer', '_weight_quantizer')}
    assert found['meta']['kept_float'] == reasons and found['meta']['macs'] == {'a': 5}


def kept_in_python(path, **meta):
    """A checkpoint of a toy of which a layer was kept float in Python, and its values."""
    torch.manual_seed(0)
    model = Toy().eval()
    keep_float(model, SKIP)
    mq.calibrate(model, [Points().images])
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return model(Points().images)


@pytest.mark.parametrize('known', [False, True])
def test_what_was_kept_float_in_python_is_told_with_lines_that_work(tmp_path, known):
    path = tmp_path / 'int8.pth'
    reasons = {f'b.{q}': SKIP['b'] for q in ('_input_quantizer', '_weight_quantizer')}
    wanted = kept_in_python(path, **(dict(kept_float=reasons) if known else {}))
    with pytest.raises(UncalibratedError, match='kept float, or were of a float type') as err:
        load_weights(Toy(), path, calibrated=True)
    line = f"model = dict(type='Quantized', of='Toy', skip={SKIP if known else {'b': 'why'}})"
    assert line in str(err.value)
    scope = {}
    exec(line, scope)
    model = MODELS.build(scope['model'])
    model.eval()
    load_weights(model, path, calibrated=True)
    assert torch.equal(model(Points().images), wanted)


def test_qat_and_plain_loading_tell_it_too(tmp_path):
    kept_in_python(tmp_path / 'int8.pth')
    with pytest.raises(UncalibratedError, match="of='Toy', skip={'b': 'why'}"):
        runner(tmp_path, tmp_path / 'int8.pth', [QAT]).train()
    model = Toy().eval()
    model.load_state_dict(torch.load(tmp_path / 'int8.pth')['state_dict'], strict=False)
    with pytest.raises(UncalibratedError, match='kept float.*Quantized'):
        model(Points().images)


def test_ranges_of_what_the_config_keeps_float_are_told_to_be_unused(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(weights, 'print_log', lambda text, **how: told.append(text))
    load_weights(MODELS.build(dict(SETTINGS)), calibrated(tmp_path / 'c.pth'), calibrated=True)
    assert len(told) == 1 and '2 ranges are not used' in told[0] and 'b._input_quant' in told[0]


def test_errors_of_calibration_advise_what_there_is():
    model = Toy()
    nn.init.zeros_(model.norm.weight)
    nn.init.zeros_(model.norm.bias)
    with pytest.raises(mq.CalibrationError, match='zeros') as err:
        mq.calibrate(model, [Points().images])
    assert "model = dict(type='Quantized', of='Toy', skip={'head': 'why'})" in str(err.value)
    resnet = MODELS.build(dict(type='QuantResNet', depth=18, base_channels=4))
    nn.init.zeros_(resnet.conv1.weight)
    nn.init.zeros_(resnet.bn1.weight)
    with pytest.raises(mq.CalibrationError) as err:
        mq.calibrate(resnet, [torch.randn(1, 3, 32, 32)])
    assert 'keep them float: skip={' in str(err.value) and 'Quantized' not in str(err.value)


def test_the_log_of_a_training_tells_what_stays_float(tmp_path, monkeypatch):
    """With the multiply-accumulates that calibration counted."""
    start, told = tmp_path / 'int8.pth', []
    reasons = {f'b.{q}': SKIP['b'] for q in ('_input_quantizer', '_weight_quantizer')}
    kept_in_python(start, kept_float=reasons, macs=dict(a=30, b=60, head=10))
    run = runner(tmp_path, start, [QAT], model=dict(SETTINGS, learn_amax=False), epochs=1)
    for level in ('info', 'warning'):
        monkeypatch.setattr(run.logger, level, lambda text, *args: told.append(str(text)))
    run.train()
    (text,) = (text for text in told if 'multiply-accumulates' in text)
    assert text.splitlines() == [
        'QATHook: 2 of 3 layers quantized, 40.0 % of the multiply-accumulates',
        f'float: b (1 layer, 60.0 %): {SKIP["b"]}',
    ]


def test_an_inherited_skip_can_be_emptied(tmp_path):
    (tmp_path / 'base.py').write_text(f'model = {SETTINGS}')
    text = "_base_ = ['./base.py']\nmodel = dict(skip=dict(_delete_=True))"
    (tmp_path / 'all.py').write_text(text)
    model = build_model(read_config(tmp_path / 'all.py'))
    assert model.b._input_quantizer.float_reason is None
