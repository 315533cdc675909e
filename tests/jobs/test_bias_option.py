"""Calibration from files to files with steps after the ranges."""

import pytest
import torch

from mmdet3d_quant.core.modes import float_state_dict
from mmdet3d_quant.improve import BiasCorrection, EmptyCells
from mmdet3d_quant.jobs.calibration import calibrate_checkpoint
from mmdet3d_quant.runs import from_config as fc
from tests.sensitivity.toy import toy, write


def test_biases_of_named_layers_change_and_the_rest_is_the_same(tmp_path):
    config, _ = write(tmp_path)
    torch.save(dict(state_dict=float_state_dict(toy())), tmp_path / 'float.pth')
    states = {}
    for name, patterns in dict(plain=[], corrected=['backbone.stem', 'backbone.blocks']).items():
        out = tmp_path / f'{name}.pth'
        kwargs = dict(bias_correction=patterns, num_batches=3 if patterns else 2, device='cpu')
        calibrate_checkpoint(config, tmp_path / 'float.pth', out, **kwargs)
        states[name] = torch.load(out, weights_only=False)
    plain, corrected = (states[n]['state_dict'] for n in ('plain', 'corrected'))
    changed = {k for k in plain if not torch.equal(plain[k], corrected[k])}
    # of the three batches one is held out, so that the ranges are the same
    blocks = {f'backbone.blocks.{i}.conv{j}.bias' for i in range(4) for j in (1, 2)}
    assert changed == blocks | {'backbone.stem.bias'} and plain.keys() == corrected.keys()
    layers = sorted(k.rpartition('.')[0] for k in changed)
    assert states['corrected']['meta']['bias_corrected'] == layers
    model = fc.build_model(fc.read_config(config))
    fc.load_weights(model, tmp_path / 'corrected.pth', calibrated=True)


def test_empty_cells_are_an_option_that_the_checkpoint_tells(tmp_path, monkeypatch):
    config, checkpoint = write(tmp_path)
    order = []
    for step in (EmptyCells, BiasCorrection):
        own = step.__call__
        monkeypatch.setattr(
            step, '__call__', lambda s, *args, own=own: (order.append(type(s)), own(s, *args))
        )
    out = tmp_path / 'o.pth'
    options = dict(empty_cells=True, bias_correction=['*'], num_batches=3, device='cpu')
    calibrate_checkpoint(config, checkpoint, out, **options)
    assert order == [EmptyCells, BiasCorrection]  # biases of the weights that are there at the end
    assert torch.load(out, weights_only=False)['meta']['empty_cells'] == []


def test_a_pattern_that_names_nothing_is_an_error_at_once(tmp_path):
    config, checkpoint = write(tmp_path)
    with pytest.raises(ValueError, match="'no_such' names no quantized layer"):
        calibrate_checkpoint(config, checkpoint, tmp_path / 'o.pth', bias_correction=['no_such'])
