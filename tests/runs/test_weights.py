"""Weights as people bring them: wrapped, of mit-han-lab, of another number of classes."""

from collections import OrderedDict

import pytest
import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint as mmengine_load
from torch import nn

from mmdet3d_quant import UncalibratedError
from mmdet3d_quant.core.modes import uncalibrated
from mmdet3d_quant.files.checkpoint import CheckpointError, read_checkpoint
from mmdet3d_quant.layers import QuantConv2d
from mmdet3d_quant.runs import weights, wrappers
from mmdet3d_quant.runs.conversion import maker_of
from mmdet3d_quant.runs.weights import load_weights
from tests.qat.toy import calibrated as calibrated_toy
from tests.qat.toy_config import config
from tests.tools.tiny import TEST, TRAIN


class Net(nn.Module):
    """A backbone, and a head of so many classes."""

    def __init__(self, classes=4, layer=nn.Conv2d):
        super().__init__()
        self.backbone = nn.Sequential(layer(3, 8, 1), nn.BatchNorm2d(8))
        self.head = layer(8, classes, 1)

    def forward(self, x):
        return self.head(self.backbone(x))


class Outer(nn.Module):
    """A model whose own names begin like a wrapper's."""

    def __init__(self):
        super().__init__()
        self.model = Net()


def save(path, state, prefix='', **more):
    new = OrderedDict((prefix + name, value) for name, value in state.items())
    torch.save(dict(state_dict=new, **more), path)
    return path


def calibrated(classes=4):
    model = Net(classes, QuantConv2d)
    for layer in (model.backbone[0], model.head):
        layer._input_quantizer.amax = 2.0
        layer._weight_quantizer.amax = layer.weight_amax()
    return model.eval()


PREFIXES = ['module.', '_orig_mod.', 'model.', 'module._orig_mod.', 'model.module.model.']


@pytest.mark.parametrize('prefix', PREFIXES)
def test_prefixes_of_wrappers_are_taken_off_and_told(tmp_path, monkeypatch, prefix):
    told = []
    monkeypatch.setattr(wrappers, 'print_log', lambda text, **how: told.append(text))
    source, path = Net(), tmp_path / 'c.pth'
    save(path, source.state_dict(), prefix)
    strict, lenient = Net(), Net()
    load_weights(strict, path, calibrated=False)
    assert told == [f'{path}: {prefix!r} before all names is taken off']
    wrappers.accept_wrapped(nn.DataParallel(lenient))
    mmengine_load(lenient, str(path), strict=True)  # as a Runner does
    for model in (strict, lenient):
        assert all(torch.equal(v, source.state_dict()[n]) for n, v in model.state_dict().items())


def test_names_that_fit_stay_and_averaged_models_lose_their_counter(tmp_path):
    source = Outer()
    load_weights(Outer(), save(tmp_path / 'a.pth', source.state_dict()), calibrated=False)
    load_weights(Outer(), save(tmp_path / 'b.pth', source.state_dict(), 'module.'), False)
    averaged = {'steps': torch.tensor(7)}
    averaged.update({f'module.{n}': v for n, v in Net().state_dict().items()})
    torch.save(dict(ema_state_dict=averaged), tmp_path / 'c.pth')
    load_weights(Net(), tmp_path / 'c.pth', calibrated=False)
    counted = {**source.model.state_dict(), 'steps': torch.tensor(7)}
    with pytest.raises(CheckpointError, match='1 unknown entries, for example steps'):
        load_weights(Net(), save(tmp_path / 'd.pth', counted), calibrated=False)


def test_the_version_of_a_layer_keeps_its_place(tmp_path):
    state = nn.DataParallel(Net()).state_dict()
    bare = wrappers.without(state, 'module.')
    assert bare._metadata == Net().state_dict()._metadata and list(bare) == list(Net().state_dict())


def test_a_partial_fit_names_counts_parts_and_first_keys(tmp_path):
    state = {f'module.{n}': v for n, v in Net().state_dict().items() if 'backbone' not in n}
    state['module.neck.weight'] = torch.ones(1)
    before = Net()
    kept = {n: v.clone() for n, v in before.state_dict().items()}
    with pytest.raises(CheckpointError) as err:
        load_weights(before, save(tmp_path / 'c.pth', state), calibrated=False)
    text = str(err.value)
    assert 'another architecture: it lacks 6 of 9 entries, for example backbone.0.weight' in text
    assert (
        '(backbone 6)' in text and 'has 1 unknown entries, for example neck.weight (neck 1)' in text
    )
    wrappers.accept_wrapped(before)
    with pytest.raises(RuntimeError):  # nor is the prefix taken off by the loader of a Runner
        before.load_state_dict(state)
    assert all(
        torch.equal(v, kept[n]) for n, v in before.backbone.state_dict(prefix='backbone.').items()
    )


def test_another_number_of_classes_is_told_with_both_shapes_and_the_remedy(tmp_path):
    path = save(tmp_path / 'c.pth', Net(10).state_dict())
    with pytest.raises(CheckpointError) as err:
        load_weights(Net(4), path, calibrated=False)
    text = str(err.value)
    assert 'head.weight: (10, 8, 1, 1) in the checkpoint, (4, 8, 1, 1) in the model' in text
    assert 'head.bias: (10,) in the checkpoint, (4,) in the model' in text
    assert 'num_classes' in text and 'load_from' in text and 'backbone' not in text


def test_ranges_of_another_shape_are_told_or_refused(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(weights, 'print_log', lambda text, **how: told.append(text))
    state = calibrated().state_dict()
    name = 'head._weight_quantizer._amax'
    state[name] = torch.ones(1, 8, 1, 1)
    path = save(tmp_path / 'c.pth', state)
    model = Net(4, QuantConv2d)
    load_weights(model, path, calibrated=False)
    assert f'{name}: (1, 8, 1, 1) in the checkpoint, (4, 1, 1, 1) in the model' in told[0]
    assert uncalibrated(model) == ['head._weight_quantizer']
    assert torch.equal(model.head.weight, state['head.weight'])
    match = r'1 ranges of another shape.*calibrate.py(?s:.)*\(1, 8, 1, 1\).*\(4, 1, 1, 1\)'
    with pytest.raises(CheckpointError, match=match):
        load_weights(Net(4, QuantConv2d), path, calibrated=True)


@pytest.mark.parametrize(
    ('notes', 'told'),
    [
        ('text', 'expected a dict, got str'),
        ({'head._input_quantizer': 1.0}, 'of head._input_quantizer: expected two floats'),
        ({'head._input_quantizer': (1.0,)}, 'of head._input_quantizer: expected two floats'),
        ({'head._input_quantizer': (1.0, float('nan'))}, 'expected two floats, finite'),
        ({'head._input_quantizer': (1.0, -2.0)}, 'expected two floats, finite'),
    ],
)
def test_notes_of_unsigned_ranges_that_are_none_are_refused(tmp_path, notes, told):
    net = Net(layer=QuantConv2d)
    path = save(tmp_path / 'a.pth', net.state_dict(), '', meta=dict(unsigned_ranges=notes))
    with pytest.raises(CheckpointError, match=f'a.pth: unsigned_ranges.*{told}'):
        load_weights(Net(layer=QuantConv2d), path, calibrated=False)


def test_a_lenient_start_with_other_classes_names_the_layer(tmp_path):
    """As a Runner loads: what fits; the ranges that did not are none, not NaN."""
    path = save(tmp_path / 'c.pth', calibrated(10).state_dict())
    model = Net(4, QuantConv2d).eval()
    mmengine_load(model, str(path))
    assert uncalibrated(model) == ['head._weight_quantizer']
    with pytest.raises(UncalibratedError, match='weight of QuantConv2d'):
        model(torch.ones(1, 3, 2, 2))


def test_ranges_in_a_float_model_say_so(tmp_path):
    path = save(tmp_path / 'c.pth', calibrated().state_dict())
    with pytest.raises(CheckpointError, match='4 unknown.*Those are ranges: give a config that'):
        load_weights(Net(), path, calibrated=False)


MIT = {
    'module.encoders.camera.neck.fpn_convs.0.conv.weight': torch.ones(1),
    'module.decoder.backbone.blocks.0.0.weight': torch.ones(1),
    'module.decoder.backbone.blocks.0.1.running_var': torch.ones(1),
}


def test_mit_han_lab_s_checkpoint_is_named_with_its_command(tmp_path):
    path = save(tmp_path / 'mit.pth', MIT)
    with pytest.raises(CheckpointError, match='mit.pth is a BEVFusion of mit-han-lab.*convert_ch'):
        load_weights(Net(), path, calibrated=False)
    folded = list(MIT)[:2]
    assert 'CUDA-BEVFusion; batch norm is folded' in maker_of(folded)
    same = nn.Module()
    same.encoders = nn.ModuleDict(dict(camera=nn.Linear(2, 2)))
    load_weights(same, save(tmp_path / 'own.pth', same.state_dict()), calibrated=False)
    assert maker_of(['img_backbone.conv1.weight', 'decoder.layers.0.weight']) is None


def test_tools_load_a_wrapped_checkpoint_like_a_bare_one(tmp_path):
    """They look into it first, and then mmengine's Runner loads it."""
    scores, trained = [], []
    for prefix in ('', 'module.model.'):
        folder = tmp_path / f'start{len(scores)}'
        folder.mkdir()
        start = calibrated_toy(folder / 'bare.pth')
        start = save(folder / 'int8.pth', torch.load(start)['state_dict'], prefix, meta={})
        args = [str(config(folder)), str(start), '--work-dir', str(folder / 'test')]
        scores.append(TEST.main(args)['error'])
        TRAIN.main([str(config(folder)), '--work-dir', str(folder / 'train')])
        trained.append(read_checkpoint(folder / 'train/epoch_1.pth')['state_dict'])
    assert scores[0] == scores[1]
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_a_training_from_mit_han_lab_s_weights_is_refused(tmp_path):
    """mmengine would load nothing of it and begin."""
    path = save(tmp_path / 'mit.pth', MIT)
    with pytest.raises(CheckpointError, match='load_from=.*mit-han-lab.*convert_checkpoint'):
        TRAIN.check_start(Config(dict(load_from=str(path), model=dict(type='BEVFusion'))))
