"""Every registered Quant type against its float parent: equal, and interchangeable weights."""

import pytest
import torch
from mmcv.ops import SparseConv3d as MMCVSparseConv3d
from mmcv.ops import SparseConvTensor as MMCVTensor
from mmcv.ops import SubMConv3d as MMCVSubMConv3d
from mmdet.models import ResNet
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet3d.models import SECOND, SECONDFPN
from mmdet3d.models.layers import SparseBasicBlock
from mmdet3d.registry import MODELS
from mmengine.registry import MODELS as ROOT
from spconv.pytorch import SparseConvTensor
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet3d_quant import UncalibratedError, calibrate, quantizers, set_mode
from mmdet3d_quant.core.compat import removeprefix, strict_zip
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.sparse import SPARSE_CONVS
from mmdet3d_quant.models.convert import WHOLE
from mmdet3d_quant.parents import (
    BEVFusionSparseEncoder,
    ConvFuser,
    DepthLSSTransform,
    GeneralizedLSSFPN,
    LSSTransform,
    PortableSparseEncoder,
)
from mmdet3d_quant.parents.sparse_conv import PortableSparseConv3d, PortableSubMConv3d
from tests.models.small import VIEW


class Lift(nn.Module):
    """The per-image part and the BEV part of a view transform, without geometry."""

    def __init__(self, view):
        super().__init__()
        self.view = view

    def forward(self, x, *depth):
        return (*self.view.lift(x, *depth), self.view.downsample(x[:, 0, :6]))


class OnVoxels(nn.Module):
    """A sparse layer between values and values, at fixed sites."""

    kind = SparseConvTensor

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, features):
        coords = voxels([6, 5, 4], 90, channels=1)[1]
        return self.layer(self.kind(features, coords, [6, 5, 4], 2)).features


class OnMMCVVoxels(OnVoxels):
    kind = MMCVTensor


def voxels(shape, count, channels, seed=0):
    """Random sites in two samples of a grid, and values there."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(0, n, (count,), generator=generator) for n in (2, *shape)]
    coords = torch.stack(columns, 1).unique(dim=0).int()
    return torch.randn(len(coords), channels, generator=generator), coords


def image(channels=3, size=32):
    return torch.randn(2, channels, size, size)


ENCODER = dict(
    in_channels=5,
    base_channels=8,
    output_channels=16,
    encoder_channels=((8, 12), (12, 16), (16,)),
    block_type='basicblock',
    norm_cfg=dict(type='BN1d', eps=1e-3, momentum=0.01),
)

#: Quant type -> float parent, arguments, inputs, wrapper to run it.
CASES = {
    'QuantConv2d': (nn.Conv2d, dict(in_channels=3, out_channels=4, kernel_size=3), [image()]),
    'QuantConvTranspose2d': (
        nn.ConvTranspose2d,
        dict(in_channels=3, out_channels=4, kernel_size=3, stride=2, output_padding=1),
        [image()],
    ),
    'QuantConv1d': (
        nn.Conv1d,
        dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, groups=2),
        [torch.randn(2, 4, 9)],
    ),
    'QuantConv3d': (
        nn.Conv3d,
        dict(in_channels=2, out_channels=3, kernel_size=3, padding=1, padding_mode='circular'),
        [torch.randn(2, 2, 5, 4, 3)],
    ),
    'QuantConvTranspose1d': (
        nn.ConvTranspose1d,
        dict(in_channels=3, out_channels=4, kernel_size=3, stride=2, output_padding=1),
        [torch.randn(2, 3, 5)],
    ),
    'QuantConvTranspose3d': (
        nn.ConvTranspose3d,
        dict(in_channels=4, out_channels=6, kernel_size=2, stride=2, groups=2),
        [torch.randn(2, 4, 3, 4, 5)],
    ),
    'QuantLinear': (nn.Linear, dict(in_features=5, out_features=4), [torch.randn(7, 5)]),
    'QuantBasicBlock': (BasicBlock, dict(inplanes=8, planes=8), [image(8)]),
    'QuantBottleneck': (Bottleneck, dict(inplanes=16, planes=4), [image(16)]),
    'QuantResNet': (ResNet, dict(depth=50, base_channels=8), [image(size=64)]),
    'QuantGeneralizedLSSFPN': (
        GeneralizedLSSFPN,
        dict(in_channels=[4, 8, 16], out_channels=8, num_outs=3),
        [[image(4, 16), image(8, 8), image(16, 4)]],
    ),
    'QuantLSSTransform': (LSSTransform, VIEW, [torch.randn(1, 2, 8, 4, 8)]),
    'QuantDepthLSSTransform': (
        DepthLSSTransform,
        VIEW,
        [torch.randn(1, 2, 8, 4, 8), torch.rand(1, 2, 1, 32, 64)],
    ),
    'QuantConvFuser': (
        ConvFuser,
        dict(in_channels=[4, 6], out_channels=8),
        [[image(4, 16), image(6, 16)]],
    ),
    'QuantSECOND': (
        SECOND,
        dict(
            in_channels=8,
            out_channels=[8, 16],
            layer_nums=[1, 2],
            layer_strides=[1, 2],
            conv_cfg=dict(type='Conv2d', bias=False),
        ),
        [image(8, 16)],
    ),
    'QuantSECONDFPN': (
        SECONDFPN,
        dict(
            in_channels=[8, 16],
            out_channels=[8, 8],
            upsample_strides=[1, 2],
            upsample_cfg=dict(type='deconv', bias=False),
            use_conv_for_no_stride=True,
        ),
        [[image(8, 16), image(16, 8)]],
    ),
    'QuantSubMConv3d': (
        PortableSubMConv3d,
        dict(in_channels=4, out_channels=6, kernel_size=3, padding=1),
        [voxels([6, 5, 4], 90, 4)[0]],
    ),
    'QuantSparseConv3d': (
        PortableSparseConv3d,
        dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, padding=1),
        [voxels([6, 5, 4], 90, 4)[0]],
    ),
    # mmcv has no 3 x 3 x 3 for CPUs; tests/layers/test_sparse.py has one in the place of its own
    'QuantMMCVSubMConv3d': (
        MMCVSubMConv3d,
        dict(in_channels=4, out_channels=6, kernel_size=1),
        [voxels([6, 5, 4], 90, 4)[0]],
    ),
    'QuantMMCVSparseConv3d': (
        MMCVSparseConv3d,
        dict(in_channels=4, out_channels=6, kernel_size=1),
        [voxels([6, 5, 4], 90, 4)[0]],
    ),
    'QuantSparseBasicBlock': (
        SparseBasicBlock,
        dict(inplanes=8, planes=8, conv_cfg=dict(type=PortableSubMConv3d)),
        [voxels([6, 5, 4], 90, 8)[0]],
    ),
    'QuantBEVFusionSparseEncoder': (
        BEVFusionSparseEncoder,
        dict(ENCODER, sparse_shape=[24, 20, 13], encoder_paddings=((0, 1), (0, (1, 1, 0)), (0,))),
        [*voxels([24, 20, 13], 900, 5), 2],
    ),
    'QuantSparseEncoder': (
        PortableSparseEncoder,
        dict(ENCODER, sparse_shape=[13, 20, 24], encoder_paddings=((0, 1), (0, (0, 1, 1)), (0,))),
        [*voxels([13, 20, 24], 900, 5), 2],
    ),
}
WRAPPERS = {
    'QuantLSSTransform': Lift,
    'QuantDepthLSSTransform': Lift,
    'QuantSubMConv3d': OnVoxels,
    'QuantSparseConv3d': OnVoxels,
    'QuantMMCVSubMConv3d': OnMMCVVoxels,
    'QuantMMCVSparseConv3d': OnMMCVVoxels,
    'QuantSparseBasicBlock': OnVoxels,
}
#: Types without a float module as parent, and where they are tested.
ELSEWHERE = {
    'QuantConcat': 'tests/layers/test_layers.py',
    'QuantAdd': 'tests/layers/test_layers.py',
    'Quant': 'tests/models/test_quant.py',
    'Quantized': 'tests/models/test_quantized.py',
    'QuantTransFusionHead': 'tests/models/test_transfusion_head.py',
}
#: Layers and blocks: the model that contains them lets ranges be learned.
PARTS = {
    name
    for name in CASES
    if name.startswith(('QuantConv1d', 'QuantConv2d', 'QuantConv3d', 'QuantConvT'))
    or name.startswith(('QuantLinear', 'QuantMMCV'))
    or name.endswith(('Block', 'Bottleneck', 'Conv3d'))
}


def registered():
    return {n for r in (ROOT, MODELS) for n in r.module_dict if n.startswith('Quant')}


def whole(name, **options):
    """A quantized module, all of it that its type can quantize."""
    kwargs = dict(CASES[name][1], **WHOLE.get(removeprefix(name, 'Quant'), {}))
    return MODELS.build(dict(type=name, **kwargs, **options))


def build(name):
    """A float parent and its quantized child with the same weights, in eval mode."""
    parent, kwargs, inputs = CASES[name]
    torch.manual_seed(0)
    floating, quantized = parent(**kwargs), whole(name)
    for m in floating.modules():
        if isinstance(m, _BatchNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.running_mean, std=0.1)
    keys = quantized.load_state_dict(floating.state_dict(), strict=False)
    wrap = WRAPPERS.get(name, lambda m: m)
    floating, quantized = wrap(floating), wrap(quantized)
    floating.eval()
    quantized.eval()
    return floating, quantized, inputs, keys


def flat(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def test_every_registered_type_is_tested():
    assert registered() == set(CASES) | set(ELSEWHERE)


@pytest.mark.parametrize('name', CASES)
def test_float_mode_equals_the_parent_bit_for_bit(name):
    floating, quantized, inputs, _ = build(name)
    with set_mode(quantized, 'float'), torch.no_grad():
        pairs = strict_zip(flat(floating(*inputs)), flat(quantized(*inputs)))
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize('name', CASES)
def test_float_checkpoints_load_and_only_ranges_are_missing(name):
    floating, quantized, _, keys = build(name)
    assert not keys.unexpected_keys
    assert keys.missing_keys and all(k.endswith('._amax') for k in keys.missing_keys)
    floating_keys = [k for k in quantized.state_dict() if not k.endswith('._amax')]
    assert floating_keys == list(floating.state_dict())


@pytest.mark.parametrize('name', CASES)
def test_every_convolution_is_quantized(name):
    _, quantized, _, _ = build(name)
    left = [
        n
        for n, m in quantized.named_modules()
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, *SPARSE_CONVS))
        and not isinstance(m, QuantLayer)
    ]
    assert not left


@pytest.mark.parametrize('name', CASES)
def test_quantized_output_is_near_the_float_one_and_not_it(name):
    floating, quantized, inputs, _ = build(name)
    with torch.no_grad():
        with pytest.raises(UncalibratedError):
            quantized(*inputs)
        calibrate(quantized, [inputs], 'max')
        for a, b in strict_zip(flat(floating(*inputs)), flat(quantized(*inputs))):
            error = float((a - b).norm() / a.norm())
            assert 0 < error < 0.1, error


@pytest.mark.parametrize('name', CASES)
def test_unknown_arguments_name_the_parent_type(name):
    parent, kwargs, _ = CASES[name]
    with pytest.raises(TypeError):
        MODELS.build(dict(type=name, **kwargs, colour='red'))


@pytest.mark.parametrize('name', ['QuantResNet', 'QuantSECOND', 'QuantConvFuser'])
def test_skip_keeps_layers_float_and_refuses_unknown_patterns(name):
    _, kwargs, inputs = CASES[name]
    model = MODELS.build(dict(type=name, **kwargs, skip={'*': 'all of it'}))
    model.eval()
    assert all(q.float_reason == 'all of it' for q in quantizers(model).values())
    model(*inputs)  # nothing left to calibrate
    with pytest.raises(ValueError, match=f"'conv99' matches no quantized layer of {name}"):
        MODELS.build(dict(type=name, **kwargs, skip=['conv99']))


@pytest.mark.parametrize('name', CASES)
def test_every_model_can_learn_its_activation_ranges(name):
    inputs = CASES[name][2]
    if name in PARTS:
        return
    fixed = build(name)[1]
    learning = whole(name, learn_amax=True)
    wrap = WRAPPERS.get(name, lambda m: m)
    learning = wrap(learning)
    learning.eval()
    calibrate(fixed, [inputs], 'max')
    learning.load_state_dict(fixed.state_dict())
    a, b = flat(fixed(*inputs)), flat(learning(*inputs))
    assert all(torch.equal(x, y) for x, y in strict_zip(a, b))
    sum(y.square().mean() for y in b).backward()
    for full, quantizer in quantizers(learning).items():
        active = quantizer.float_reason is None
        assert quantizer.learned == (active and not full.endswith('_weight_quantizer'))
        assert not quantizer.learned or torch.isfinite(quantizer._amax.grad).all()
