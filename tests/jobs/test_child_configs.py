"""What `quantize_config` writes builds, says what stays float, and is the float model in float."""

import sys

import pytest
import torch
from mmdet3d.models.dense_heads import Anchor3DHead
from mmdet3d.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.core.coverage import coverage
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.modes import float_state_dict
from mmdet3d_quant.export import detector_cuts, generate_inputs
from mmdet3d_quant.jobs import swaps
from mmdet3d_quant.jobs.child_configs import quantize_config
from mmdet3d_quant.runs import from_config as fc
from tests.small import ROOT
from tests.zoo import SMALL, ZOO, small_model, small_zoo

sys.path.insert(0, str(ROOT / 'tools'))
import quantize_config as tool  # noqa: E402

#: Without a general type: what of each model is named, or takes `conv_cfg`.
CHANGES = {
    'pointpillars': dict(backbone=dict(type='QuantSECOND'), neck=dict(type='QuantSECONDFPN')),
    'centerpoint': dict(
        pts_backbone=dict(type='QuantSECOND'),
        pts_neck=dict(type='QuantSECONDFPN'),
        pts_bbox_head=dict(
            conv_cfg=dict(type='QuantConv2d'),
            separate_head=dict(conv_cfg=dict(type='QuantConv2d')),
        ),
    ),
    'fcos3d': dict(
        backbone=dict(type='QuantResNet'),
        neck=dict(conv_cfg=dict(type='QuantConv2d')),
        bbox_head=dict(conv_cfg=dict(type='QuantConv2d')),
    ),
}
IMAGE = (64, 96)


@pytest.fixture(autouse=True)
def no_general_type(monkeypatch):
    """The type that quantizes any other is left out, wherever it is registered."""
    real = MODELS.get
    monkeypatch.setattr(MODELS, 'get', lambda name: None if name == 'Quant' else real(name))


def write(folder, name, **changes):
    """A float config of a small detector."""
    path = folder / f'{name}.py'
    Config(dict(model=small_model(name, **changes), default_scope='mmdet3d')).dump(path)
    return path


@pytest.mark.parametrize('name', CHANGES)
def test_types_change_and_nothing_else(name, tmp_path):
    config = write(tmp_path, name)
    written = quantize_config(config, tmp_path / 'out' / 'int8.py')
    old, new = Config.fromfile(config).model, Config.fromfile(written.int8).model
    told = new.pop('skip', {})
    if told:
        assert new.pop('type') == 'Quantized' and new.pop('of') == old.pop('type')
        assert list(told) == [k for k in old if k.endswith('voxel_encoder')]
    for part, change in CHANGES[name].items():
        for key, value in change.items():
            assert new[part][key] == value or dict(old[part][key], **value) == new[part][key]
            old[part][key] = new[part][key]
    assert new.to_dict() == old.to_dict()
    torch.manual_seed(0)
    model = fc.build_model(fc.read_config(written.int8))
    assert {layer.name for layer in written.coverage.quantized} == {
        layer.name for layer in coverage(model).quantized
    }


def test_float_mode_is_the_float_model_to_the_bit_and_the_model_calibrates(tmp_path):
    config = write(tmp_path, 'fcos3d')
    written = quantize_config(config, tmp_path / 'int8.py')
    torch.manual_seed(0)
    model, plain = (fc.build_model(fc.read_config(c)) for c in (written.int8, config))
    plain.load_state_dict(float_state_dict(model))
    inputs = generate_inputs(model, image_size=IMAGE)
    with torch.no_grad(), mq.set_mode(model, 'float'):
        (one,), (other,) = detector_cuts(model, inputs), detector_cuts(plain, inputs)
        pairs = list(zip(one.module(inputs['input']), other.module(inputs['input'])))
        assert len(pairs) == 15 and all(torch.equal(x, y) for x, y in pairs)
    result = mq.calibrate(one.module, [(inputs['input'],)])
    assert len(result.ranges) > 30


def test_comments_say_what_stays_float_and_why(tmp_path):
    text = quantize_config(write(tmp_path, 'pointpillars'), tmp_path / 'int8.py').int8.read_text()
    assert '# bbox_head (Anchor3DHead, 3 layers) stays float: there is no Quant type' in text
    skip = Config.fromfile(tmp_path / 'int8.py').model.skip
    assert 'would be lost in steps of INT8' in skip.voxel_encoder
    made = coverage(fc.build_model(fc.read_config(tmp_path / 'int8.py')))
    (encoder,) = [layer for layer in made.layers if layer.name.startswith('voxel_encoder')]
    assert encoder.meant and encoder.reason == skip.voxel_encoder


@pytest.mark.parametrize('name, pillars', [('pointpillars', True), ('fcos3d', False)])
def test_pillars_are_calibrated_with_their_empty_cells(name, pillars, tmp_path):
    text = quantize_config(write(tmp_path, name), tmp_path / 'int8.py').int8.read_text()
    (command,) = [line for line in text.splitlines() if 'mmdet3d-quant calibrate' in line]
    assert command.endswith(' --empty-cells') == pillars
    assert ('# Most cells hold no pillar' in text) == pillars


def test_a_general_type_serves_what_has_no_type_of_its_own(tmp_path, monkeypatch):
    class Quant(Anchor3DHead):
        def __init__(self, of, **kwargs):
            assert of == 'Anchor3DHead'
            super().__init__(**kwargs)
            for name in ('conv_cls', 'conv_reg', 'conv_dir_cls'):
                old = getattr(self, name)
                setattr(self, name, mq.layers.QuantConv2d(old.in_channels, old.out_channels, 1))

    real = MODELS.get
    monkeypatch.setattr(MODELS, 'get', lambda name: Quant if name == 'Quant' else real(name))
    written = quantize_config(write(tmp_path, 'pointpillars'), tmp_path / 'int8.py')
    assert Config.fromfile(written.int8).model.bbox_head['of'] == 'Anchor3DHead'
    assert len(written.coverage.quantized) == len(written.coverage.layers) - 1


def test_a_deformable_backbone_stays_float_with_both_reasons(tmp_path):
    dcn = dict(type='DCNv2', deform_groups=1, fallback_on_stride=False)
    config = write(
        tmp_path,
        'fcos3d',
        backbone=dict(depth=50, dcn=dcn, stage_with_dcn=(False, False, False, True)),
        neck=dict(in_channels=[32, 64, 128, 256]),
    )
    written = quantize_config(config, tmp_path / 'int8.py')
    (backbone,) = [s for s in written.swaps if s.part == 'backbone']
    assert not backbone.change and 'as QuantResNet: deformable convolutions' in backbone.reason
    assert 'with conv_cfg=QuantConv2d: conv_cfg must be None' in backbone.reason


class Adaptive(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


@pytest.mark.parametrize(
    'old, new, problem',
    [
        (nn.Conv2d(2, 2, 3), mq.layers.QuantConv2d(2, 2, 3), ''),
        (nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), 'none of its layers changes'),
        (nn.Conv2d(2, 2, 3), mq.layers.QuantConv2d(2, 2, 3, bias=False), 'its weights differ: 0.b'),
        (Adaptive(2, 2, 3), mq.layers.QuantConv2d(2, 2, 3), '0 is a Adaptive, which computes'),
    ],
)
def test_a_type_that_changes_the_float_function_is_found(old, new, problem):
    found = swaps.difference(nn.Sequential(old), nn.Sequential(new))
    assert found.startswith(problem) and bool(found) == bool(problem)


def test_the_config_that_trains_on(tmp_path):
    config = write(tmp_path, 'pointpillars')
    config.write_text(
        config.read_text()
        + "custom_hooks = [dict(type='DisableObjectSampleHook')]\n"
        + "optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=0.001))\n"
        + 'train_cfg = dict(by_epoch=True, max_epochs=12, val_interval=4)\n'
    )
    qat = Config.fromfile(quantize_config(config, tmp_path / 'my_int8.py').qat)
    assert qat.filename.endswith('my_qat.py') and qat.model.backbone.type == 'QuantSECOND'
    assert [h.type for h in qat.custom_hooks] == [
        'DisableObjectSampleHook',
        'QATHook',
        'DistillHook',
    ]
    assert qat.custom_hooks[-1].modules == dict(neck=1.0)
    assert qat.train_cfg == dict(by_epoch=True, max_epochs=2, val_interval=1)
    assert qat.optim_wrapper.optimizer == dict(type='Adam', lr=1e-5)
    assert 'mmdet3d_quant.qat' in qat.custom_imports.imports and qat.load_from


def test_a_config_of_the_zoo_is_based_on_by_its_name_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = 'pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class'
    written = tool.main([str(ZOO / 'pointpillars' / f'{name}.py')])
    assert str(written.int8) == f'{name}_int8.py' and str(written.qat) == f'{name}_qat.py'
    assert f"_base_ = ['mmdet3d::pointpillars/{name}.py']" in written.int8.read_text()
    out = capsys.readouterr().out
    assert '19 of 23 layers quantized' in out and 'float: bbox_head: there is no Quant' in out
    with pytest.raises(FileExistsError, match='--force'):
        tool.main([str(ZOO / 'pointpillars' / f'{name}.py')])


def test_what_cannot_be_written_says_why(tmp_path):
    config = write(tmp_path, 'pointpillars')
    with pytest.raises(fc.ConfigError, match='is the float config itself'):
        quantize_config(config, config, force=True)
    quantize_config(config, tmp_path / 'int8.py')
    with pytest.raises(QuantError, match='has quantized types already'):
        quantize_config(tmp_path / 'int8.py', tmp_path / 'again.py')
    head = small_model('pointpillars', backbone=dict(conv_cfg=dict(type='DCN', deform_groups=1)))
    del head['neck']
    bare = tmp_path / 'bare.py'
    Config(dict(model=head, default_scope='mmdet3d')).dump(bare)
    with pytest.raises(fc.ConfigError, match='no part of .* can be quantized: .*QuantSECOND'):
        quantize_config(bare, tmp_path / 'bare_int8.py')
    assert not (tmp_path / 'bare_int8.py').exists() and SMALL


def test_a_python_config_becomes_one_whole_config(tmp_path):
    config = write(tmp_path, 'pointpillars')
    lazy = tmp_path / 'lazy.py'
    lazy.write_text(
        'from mmengine.config import read_base\n\n'
        f'with read_base():\n    from .{config.stem} import *\n'
    )
    written = quantize_config(lazy, tmp_path / 'int8.py')
    assert Config.fromfile(written.int8).model.backbone.type == 'QuantSECOND'
    assert '# bbox_head (Anchor3DHead, 3 layers) stays float' in written.int8.read_text()


def test_shapes_of_arguments_are_those_of_a_run():
    """Of a neck that takes a list of maps, and of a volume; nothing where a part cannot run."""
    init_default_scope('mmdet3d')
    shapes = swaps.argument_shapes(small_zoo('smoke', neck=dict(use_dcn=False)))
    assert shapes['backbone'] == [(1, 3, 256, 256)]
    channels, sides = (16, 32, 64, 128, 256, 512), (256, 128, 64, 32, 16, 8)
    assert shapes['neck'] == [[(1, c, s, s) for c, s in zip(channels, sides)]]
    assert shapes['bbox_head'] == [[(1, 64, 64, 64)]]
    volume = swaps.argument_shapes(small_zoo('imvoxelnet'))
    assert volume['neck_3d'] == [(1, 16, 16, 16, 12)] and len(volume['neck'][0]) == 4
    broken = small_zoo('pointpillars')
    broken.backbone.forward = lambda x: 1 / 0
    assert swaps.argument_shapes(broken) == dict(backbone=[(1, 8, 32, 48)])
