"""mmengine's Python configs: classes as types, ``read_base``, dump and reload, in every tool."""

import sys

import pytest
import torch
from mmengine.config import Config
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.core.naming import type_name
from mmdet3d_quant.data.samples import make_frame
from mmdet3d_quant.files.checkpoint import read_checkpoint
from mmdet3d_quant.layers import QuantConv2d
from mmdet3d_quant.models.base import quant_conv_cfg, quant_upsample_cfg
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
)

parts = dict(
    img_backbone=dict(type=QuantResNet),
    img_neck=dict(type=QuantGeneralizedLSSFPN),
    view_transform=dict(type=QuantDepthLSSTransform),
    fusion_layer=dict(type=QuantConvFuser),
    pts_backbone=dict(type=QuantSECOND),
    pts_neck=dict(type=QuantSECONDFPN),
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
