"""The numbers of a report: what they count, and that JSON takes them."""

import json
import os

import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmdet3d_quant import calibrate, quantizers
from mmdet3d_quant.data.evaluation import Matches, Scores
from mmdet3d_quant.layers import QuantConv2d
from mmdet3d_quant.report import facts

SAMPLES = 24  # in pairs that show the same objects
ERRORS = dict(trans_err=0.3, scale_err=0.2, orient_err=np.nan, vel_err=1.1, attr_err=0.5)


def scores(hits, mAP=None):
    """One class, one object a sample, found where ``hits`` says so."""
    hits = np.asarray(hits)
    sample, positives = np.arange(SAMPLES), np.ones(SAMPLES, dtype=np.int64)
    matches = Matches(hit=hits, sample=sample, positives=positives)
    value = matches.average_precision() if mAP is None else mAP
    return Scores(
        mAP=value,
        NDS=np.float64(0.4),
        ap=dict(car=value),
        errors=ERRORS,
        matches=dict(car=[matches]),
        clusters=np.arange(SAMPLES) // 2,
    )


def test_scores_are_plain_and_what_has_no_value_is_none():
    found = facts.score_facts(scores(np.ones(SAMPLES, dtype=bool)))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found['mAOE'] is None and found['mATE'] == 0.3 and found['mAVE'] == 1.1
    assert found['mASE'] == 0.2 and found['mAAE'] == 0.5
    assert found['mAP'] == found['ap']['car'] == pytest.approx(1.0) and found['NDS'] == 0.4


def test_the_size_of_the_validation_set():
    found = facts.data_facts(scores(np.zeros(SAMPLES, dtype=bool)))
    assert found == dict(frames=24, scenery=12, boxes=dict(car=24))


def test_differences_from_the_first_and_their_intervals():
    right = np.ones(SAMPLES, dtype=bool)
    worse, little = right.copy(), right.copy()
    worse[[1, 4, 9, 10, 11, 18, 20, 22]] = False
    little[-1] = False
    models = dict(float=scores(right), same=scores(right), worse=scores(worse), a=scores(little))
    found = facts.difference_facts(models, draws=300)
    assert list(found) == ['same', 'worse', 'a']
    assert found['same'] == dict(difference=0.0, low=0.0, high=0.0, scenery=12)
    there = found['worse']
    assert there['difference'] == models['worse'].mAP - models['float'].mAP < 0
    assert there['low'] <= there['difference'] <= there['high'] < 0
    assert found['a']['low'] < 0 and found['a']['high'] == pytest.approx(0.0)  # one pair, not drawn
    assert json.loads(json.dumps(found)) == found
    assert facts.difference_facts(models, draws=300) == found


def test_a_difference_follows_its_models_not_their_places():
    right, wrong = np.ones(SAMPLES, dtype=bool), np.arange(SAMPLES) < 12
    forth = facts.difference_facts(dict(a=scores(right), b=scores(wrong)), draws=100)['b']
    back = facts.difference_facts(dict(b=scores(wrong), a=scores(right)), draws=100)['a']
    assert back['difference'] == -forth['difference'] > 0
    assert back['low'] == pytest.approx(-forth['high'])


@pytest.fixture(scope='module')
def model():
    kept = QuantConv2d(4, 6, 3)
    for quantizer in quantizers(kept).values():
        quantizer.keep_float('a reason')
    made = nn.Sequential(QuantConv2d(3, 4, 3), kept, nn.Conv2d(6, 2, 1)).eval()
    calibrate(made, [torch.rand(1, 3, 9, 9)], 'max', forward=lambda m, x: m(x))
    return made


def test_weights_of_int8_layers_are_counted(model):
    assert facts.weight_bytes(model) == dict(float=4 * 108, int8=108)


def test_what_is_calibrated_and_what_is_not(model):
    found = facts.calibration_facts(model, dict(method='max', num_batches=1, loader='x'))
    assert found['method'] == 'max' and found['num_batches'] == 1 and found['loader'] == 'x'
    assert found['activation_quantizers'] == found['weight_quantizers'] == 1
    assert found['kept_float'] == {
        '1._input_quantizer': 'a reason',
        '1._weight_quantizer': 'a reason',
    }
    assert found['coverage']['text'].startswith('1 of 3 layers quantized')
    assert 'float: 1 (1 layer): a reason' in found['coverage']['lines']
    assert json.loads(json.dumps(found)) == found


def test_the_machine():
    found = facts.machine_facts()
    assert json.loads(json.dumps(found)) == found
    assert found['cores'] == os.cpu_count() and found['processor'] and found['system']


@pytest.mark.parametrize('flags, told', [('fpu avx_vnni sse', ['avx_vnni']), ('fpu', [])])
def test_int8_instructions_are_read_from_the_system(flags, told, tmp_path, monkeypatch):
    (tmp_path / 'cpuinfo').write_text(f'processor : 0\nmodel name\t: Some CPU: 9\nflags\t: {flags}')
    monkeypatch.setattr(facts, 'CPUINFO', tmp_path / 'cpuinfo')
    found = facts.machine_facts()
    assert found['int8_instructions'] == told and found['processor'] == 'Some CPU: 9'
    monkeypatch.setattr(facts, 'CPUINFO', tmp_path / 'missing')
    assert facts.machine_facts()['int8_instructions'] == [] and facts.machine_facts()['processor']


def test_where_a_run_comes_from(tmp_path):
    (tmp_path / 'some.pth').write_bytes(b'weights')
    (tmp_path / 'some.py').write_text("model = dict(type='X')")
    cfg = Config.fromfile(tmp_path / 'some.py')
    found = facts.provenance_facts(cfg, tmp_path / 'some.pth', 'a command')
    assert found['checkpoint']['name'] == 'some.pth' and found['command'] == 'a command'
    assert found['config'] == str(tmp_path / 'some.py')
    assert found['machine'] == facts.machine_facts()
    assert {'torch', 'mmdet3d', 'openvino', 'onnx'} <= set(found['versions'])
    assert json.loads(json.dumps(found)) == found
