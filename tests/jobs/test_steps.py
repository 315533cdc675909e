"""Steps of a calibration: read from config, recipe and call; checked before the run; recorded."""

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmdet3d_quant.core.modes import float_state_dict
from mmdet3d_quant.jobs import calibration as job
from mmdet3d_quant.jobs.steps import BEFORE, RECIPES, STEPS, as_chosen, read_steps
from mmdet3d_quant.layers import QuantConv2d
from mmdet3d_quant.runs.from_config import ConfigError
from mmdet3d_quant.runs.listener import Listener
from tests.sensitivity.toy import toy, write


def config(**calibration):
    return Config(dict(calibration=calibration))


def test_config_recipe_and_call_add_up_in_the_order_of_the_table():
    cfg = config(recipe='fast', steps=dict(bias_correction='backbone', learned_rounding=['*']))
    chosen = read_steps(cfg, toy(), None, dict(equalize_layers=['backbone.last'], smooth=False))
    # of the recipe: no linear layers to smooth, no pillars with empty cells
    assert chosen == dict(
        equalize_concats=['*'],
        equalize_layers=['*', 'backbone.last'],
        learned_rounding=['*'],
        bias_correction=['*', 'backbone'],
    )
    names = [step.name for step in STEPS]
    assert list(chosen) == [n for n in names if n in chosen]
    assert tuple(names[: len(BEFORE)]) == BEFORE
    assert read_steps(config(), toy()) == {}
    for steps in RECIPES.values():
        assert list(steps) == [n for n in names if n in steps]
    assert set(RECIPES['fast']) < set(RECIPES['best'])


def test_what_makes_no_sense_is_an_error_with_its_place():
    for given, text in (
        (dict(no_such=True), "steps: unknown step 'no_such'; there are equalize_concats, "),
        (dict(smooth=3), r"smooth takes patterns, as \['\*'\], got 3"),
        (dict(empty_cells=['backbone']), 'empty_cells takes True'),
        ([], 'must be a dict'),
    ):
        with pytest.raises(ConfigError, match=text):
            as_chosen(given, 'steps')
    with pytest.raises(ConfigError, match="unknown recipe 'slow'; there are fast, best"):
        read_steps(config(), toy(), 'slow')
    both = dict(reestimate_norms=['*'], bias_correction=['*'])
    with pytest.raises(ConfigError, match='same mean errors off twice: choose one'):
        read_steps(config(), toy(), None, both)


def test_of_two_steps_against_one_error_a_recipe_has_what_serves_or_is_asked_for():
    norms, biases = 'reestimate_norms', 'bias_correction'
    with_norms, without = toy(), nn.Sequential(QuantConv2d(2, 2, 1), QuantConv2d(2, 2, 1))
    for model, given, wanted in (
        (without, {}, biases),
        (with_norms, {}, norms),
        (with_norms, {biases: ['backbone']}, biases),
        (with_norms, {norms: ['backbone']}, norms),
    ):
        chosen = read_steps(config(recipe='fast'), model, None, given)
        assert [n for n in (norms, biases) if n in chosen] == [wanted]
    assert chosen[norms] == ['*', 'backbone']


class Heard(Listener):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_a_checkpoint_tells_its_steps_and_float_is_the_same(tmp_path):
    path, _ = write(tmp_path)
    torch.save(dict(state_dict=float_state_dict(toy())), tmp_path / 'float.pth')
    heard, out = Heard(), tmp_path / 'o.pth'
    steps = dict(equalize_layers=True, reestimate_norms=['backbone.norm'])
    job.calibrate_checkpoint(
        path, tmp_path / 'float.pth', out, steps=steps, device='cpu', listener=heard
    )
    made = torch.load(out, weights_only=False)
    assert made['meta']['steps'] == dict(equalize_layers=['*'], reestimate_norms=['backbone.norm'])
    assert 'norms_reestimated' in made['meta']
    text = 'steps beside the ranges: equalize_layers (*), reestimate_norms (backbone.norm)'
    assert any(text == note for note in heard.notes)
    state = float_state_dict(toy())
    layers = {m['source'] for m in made['meta']['layers_equalized']}
    assert layers
    for move in made['meta']['layers_equalized']:
        factor = torch.tensor(move['factors'])
        shape = [-1] + [1] * (state[f'{move["source"]}.weight'].dim() - 1)
        state[f'{move["source"]}.weight'].mul_(factor.view(shape))
        state[f'{move["source"]}.bias'].mul_(factor)
        for reader in move['readers']:
            first, last = reader['channels']
            state[f'{reader["layer"]}.weight'][:, first:last].div_(factor.view(1, -1, 1, 1))
    changed = [k for k in state if not torch.equal(state[k], made['state_dict'][k])]
    assert all(k.startswith('backbone.norm.running') for k in changed), changed


@pytest.mark.parametrize('name', [s.name for s in STEPS if not s.flag])
def test_a_pattern_that_names_nothing_is_an_error_at_once(name, tmp_path, monkeypatch):
    path, checkpoint = write(tmp_path)
    monkeypatch.setattr(job, '_observe', lambda *args: pytest.fail('it ran'))
    with pytest.raises(ValueError, match="'no_such' names no"):
        job.calibrate_checkpoint(
            path, checkpoint, tmp_path / 'o.pth', steps={name: ['no_such']}, device='cpu'
        )
