"""mmengine's Python configs: classes as types, ``read_base``, dump and reload, in every tool."""

import sys

import pytest
import torch
from mmdet3d.datasets import NuScenesDataset
from mmdet3d.evaluation import NuScenesMetric
from mmengine.config import Config
from mmengine.registry import HOOKS
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.core.naming import type_name
from mmdet3d_quant.data.nuscenes import DatasetError
from mmdet3d_quant.data.samples import make_frame
from mmdet3d_quant.files.checkpoint import read_checkpoint
from mmdet3d_quant.layers import QuantConv2d
from mmdet3d_quant.models import QuantResNet
from mmdet3d_quant.models.base import quant_conv_cfg, quant_upsample_cfg
from mmdet3d_quant.qat import QATHook
from mmdet3d_quant.runs import from_config as fc
from tests.small import ROOT, save_float, small_config, small_float_config
from tests.tools.tiny import TEST, TRAIN

sys.path.insert(0, str(ROOT / 'tools'))
import calibrate  # noqa: E402
import export_onnx  # noqa: E402
import parity  # noqa: E402

MODEL = """
from mmengine.dataset import DefaultSampler

from mmdet3d_quant.models import (
    QuantBEVFusionSparseEncoder,
    QuantConvFuser,
    QuantDepthLSSTransform,
    QuantGeneralizedLSSFPN,
    QuantResNet,
    QuantSECOND,
    QuantSECONDFPN,
    QuantTransFusionHead,
)

parts = dict(
    img_backbone=dict(type=QuantResNet),
    img_neck=dict(type=QuantGeneralizedLSSFPN),
    view_transform=dict(type=QuantDepthLSSTransform),
    fusion_layer=dict(type=QuantConvFuser),
    pts_backbone=dict(type=QuantSECOND),
    pts_neck=dict(type=QuantSECONDFPN),
    bbox_head=dict(type=QuantTransFusionHead),
)
sampler = dict(type=DefaultSampler, shuffle=False)
"""
KINDS = {
    # A new config of a text base, as mmengine's documentation has it.
    'read_base': """
from mmengine.config import read_base

with read_base():
    from .base import *
{MODEL}
model.update(parts)
calib_dataloader.update(sampler=sampler)
""",
    # A text config that imports its types.
    'classes': """
_base_ = ['./base.py']
{MODEL}
model = parts
calib_dataloader = dict(sampler=sampler)
""",
}


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """The small detector in text and in both kinds of Python, and its float weights."""
    folder = tmp_path_factory.mktemp('python')
    frame = make_frame(folder / 'frame')
    small_config(frame, folder / 'text.py')
    small_float_config(frame, folder / 'base.py')
    save_float(folder / 'text.py', folder / 'float.pth')
    for kind, text in KINDS.items():
        (folder / f'{kind}.py').write_text(text.replace('{MODEL}', MODEL))
    run(calibrate, folder / 'text.py', folder / 'float.pth', '--out', folder / 'text.pth')
    return folder


def run(tool, *args):
    return tool.main([str(arg) for arg in args])


@pytest.mark.parametrize('kind', KINDS)
def test_the_same_checkpoint_as_from_text(work, kind):
    """Also from the config that this one was dumped to."""
    cfg = fc.read_config(work / f'{kind}.py')
    cfg.dump(work / f'{kind}_dumped.py')
    again = fc.read_config(work / f'{kind}_dumped.py')
    assert again.to_dict() == cfg.to_dict()
    assert type_name(cfg.model.img_backbone.type) == 'QuantResNet'
    wanted = read_checkpoint(work / 'text.pth')['state_dict']
    run(calibrate, work / f'{kind}_dumped.py', work / 'float.pth', '--out', work / f'{kind}.pth')
    found = read_checkpoint(work / f'{kind}.pth')
    assert found['state_dict'].keys() == wanted.keys()
    assert all(torch.equal(found['state_dict'][k], v) for k, v in wanted.items())
    stored = Config.fromstring(found['meta']['cfg'], '.py')  # what mmdet3d's init_model reads
    assert type_name(stored.model.img_backbone.type) == 'QuantResNet'


@pytest.mark.parametrize('kind', KINDS)
def test_the_other_tools(work, kind, tmp_path):
    config = tmp_path.parent / f'{tmp_path.name}_tools.py'
    cfg = fc.read_config(work / f'{kind}.py')
    evaluator = dict(type='DumpResults', out_file_path=str(tmp_path / 'results.pkl'))
    cfg.test_evaluator = evaluator
    cfg.dump(config)
    run(TEST, config, work / 'text.pth', '--work-dir', tmp_path)
    assert (tmp_path / 'results.pkl').is_file()
    only = ('--only', 'fuser', '--inputs', 'generated', '--no-verify', '--no-compile')
    own = work / f'{kind}.py'
    run(export_onnx, own, work / 'text.pth', '--out-dir', tmp_path / 'onnx', *only)
    files = ('--files', 'fuser', '--inputs', 'generated', '--engines', 'onnxruntime')
    assert run(parity, own, work / 'text.pth', tmp_path / 'onnx', *files) == 0


def test_hooks_and_wrappers_may_be_classes(work, tmp_path):
    """A QAT config whose hook, optimizer wrapper and data set are classes is seen for one."""
    text = (work / 'classes.py').read_text()
    text += """
from mmdet3d.datasets import NuScenesDataset
from mmengine.optim import OptimWrapper

from mmdet3d_quant.qat import QATHook

custom_hooks = [dict(type=QATHook)]
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type='AdamW', lr=1e-4))
train_dataloader = dict(batch_size=1, dataset=dict(type=NuScenesDataset))
val_evaluator = dict(_delete_=True, type='DumpResults', out_file_path={out!r})
""".replace('{out!r}', repr(str(tmp_path / 'unused.pkl')))
    (work / 'qat.py').write_text(text)
    args = (work / 'qat.py', '--work-dir', tmp_path / 'run')
    with pytest.raises(fc.ConfigError, match='needs load_from'):
        run(TRAIN, *args)
    with pytest.raises(mq.UncalibratedError):
        run(TRAIN, *args, '--cfg-options', f'load_from={work}/float.pth')
    options = [f'load_from={work}/text.pth', 'train_cfg.max_epochs=1', 'train_cfg.val_interval=9']
    run(TRAIN, *args, '--amp', '--cfg-options', *options)
    assert (tmp_path / 'run/epoch_1.pth').is_file()


def test_layers_may_be_classes():
    for kind in (nn.Conv2d, QuantConv2d, 'torch.nn.Conv2d', 'Conv2d'):
        assert quant_conv_cfg(dict(type=kind, bias=False)) == dict(type='QuantConv2d', bias=False)
    cfg = quant_upsample_cfg(dict(type=nn.ConvTranspose2d))
    assert cfg == dict(type='QuantConvTranspose2d')
    for kind in (nn.Conv3d, 'torch.nn.Conv3d', 'DCNv2'):
        with pytest.raises(ValueError, match='cannot be quantized'):
            quant_conv_cfg(dict(type=kind))


@HOOKS.register_module()
class OwnQATHook(QATHook):
    """A hook of a user's."""


#: One hook by all the names that a config may give it.
NAMES = {
    'name': 'QATHook',
    'scoped': 'mmengine.QATHook',
    'other scope': 'mmdet3d.QATHook',
    'path': 'mmdet3d_quant.qat.hook.QATHook',
    'short path': 'mmdet3d_quant.qat.QATHook',
    'class': QATHook,
    'subclass': OwnQATHook,
    'name of a subclass': 'OwnQATHook',
}


@pytest.mark.parametrize('place', ['custom_hooks', 'default_hooks'])
@pytest.mark.parametrize('kind', NAMES.values(), ids=NAMES)
def test_a_qat_run_is_known_by_whatever_its_hook_is_called(kind, place):
    hook = dict(type=kind)
    cfg = Config({place: [hook] if place == 'custom_hooks' else dict(qat=hook)})
    with pytest.raises(fc.ConfigError, match='needs load_from'):
        TRAIN.check_start(cfg)
    TRAIN.check_start(Config(dict(custom_hooks=[dict(type='EMAHook'), dict(type='NoSuchHook')])))


OTHER = """
from mmengine.model import PretrainedInit
from torch import nn

from mmdet3d_quant.layers import QuantConv2d
from mmdet3d_quant.qat import QATHook

model = dict(
    type='QuantResNet',
    conv_cfg=dict(type=QuantConv2d),
    norms=[dict(cls=nn.BatchNorm2d), (dict(type=nn.ReLU),)],
    init_cfg=dict(type=PretrainedInit, checkpoint='some.pth'),
)
custom_hooks = [dict(type=QATHook)]
"""


def test_classes_elsewhere_than_under_type_can_be_dumped_too(tmp_path):
    (tmp_path / 'other.py').write_text(OTHER)
    cfg = fc.read_config(tmp_path / 'other.py')
    cfg.dump(tmp_path / 'dumped.py')  # as mmengine's Runner does at its start
    again = fc.read_config(tmp_path / 'dumped.py')
    for found in (cfg, again):
        assert found.model.conv_cfg.type == 'mmdet3d_quant.layers.conv.QuantConv2d'
        assert type_name(found.model.norms[1][0].type) == 'ReLU'
        assert list(TRAIN.pretrained(found.model)) == ['some.pth']
    assert cfg.model.norms[0].cls is nn.BatchNorm2d


def test_overrides_from_python_may_have_classes(tmp_path):
    (tmp_path / 'text.py').write_text("model = dict(type='QuantResNet', depth=18)\n")
    overrides = {'model.conv_cfg': dict(type=QuantConv2d), 'custom_hooks': [dict(type=QATHook)]}
    cfg = fc.read_config(tmp_path / 'text.py', overrides)
    assert type_name(cfg.custom_hooks[0].type) == 'QATHook' and 'QuantConv2d' in cfg.pretty_text


@pytest.mark.parametrize('metric', ['NuScenesMetric', 'mmdet3d.NuScenesMetric', NuScenesMetric])
@pytest.mark.parametrize('dataset', ['mmdet3d.NuScenesDataset', NuScenesDataset])
@pytest.mark.parametrize('several', [False, True])
def test_data_that_are_scored_on_are_checked_by_whatever_name(metric, dataset, several, tmp_path):
    evaluator = [dict(type='DumpResults'), dict(type=metric)] if several else dict(type=metric)
    data = dict(type=dataset, data_root=str(tmp_path), ann_file='val.pkl')
    (tmp_path / 'val.pkl').write_bytes(b'')
    cfg = Config(dict(val_dataloader=dict(dataset=data), val_evaluator=evaluator))
    with pytest.raises(DatasetError, match='v1.0-trainval'):
        fc.check_data(cfg, ['val_dataloader'])


SCOPED = ('mmengine.QuantConv2d', 'mmdet3d.Conv2d', 'mmdet3d_quant.layers.QuantConv2d')


@pytest.mark.parametrize('kind', [*SCOPED, QuantConv2d, nn.Conv2d, 'torch.nn.Conv2d'])
def test_layers_of_a_model_that_is_built_may_be_named_by_whatever_name(kind):
    cfg = Config(dict(model=dict(type=QuantResNet, depth=18, conv_cfg=dict(type=kind))))
    model = fc.build_model(cfg)
    assert type(model.layer1[0].conv1) is QuantConv2d


def test_a_config_of_mmdet3ds_wheel_is_named_by_its_package(tmp_path):
    name = 'mmdet3d::pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py'
    child = tmp_path / 'child.py'
    child.write_text(f'_base_ = [{name!r}]\n')  # mmengine finds it by itself
    model = fc.read_config(child).model
    assert model.pop('_scope_') == 'mmdet3d' and fc.read_config(name).model == model
    with pytest.raises(fc.ConfigError, match=r'nothing\.py does not exist'):
        fc.read_config('mmdet3d::pointpillars/nothing.py')
