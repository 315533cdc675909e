"""Folding batch norm, against the unfolded model in float and in fake-quant."""

import copy

import pytest
import torch
from mmcv.cnn import ConvModule
from mmcv.ops import SparseConvTensor as MMCVTensor
from mmdet3d.models.layers import make_sparse_convmodule
from mmdet3d.registry import MODELS
from spconv.pytorch import SparseConvTensor, SparseSequential, SubMConv3d
from torch import nn

from mmdet3d_quant import calibrate, fold_bn, set_mode
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.layers import QuantConv2d, QuantConvTranspose2d, QuantMMCVSubMConv3d
from mmdet3d_quant.layers.fold import without_bn
from mmdet3d_quant.models import QuantSparseBasicBlock
from tests.layers.nets import randomise, relative
from tests.models.small import BLOCKS, KINDS, cloud, kwargs_of
from tests.parents.small import BATCH, SHAPE
from tests.parents.small import cloud as few_voxels

MODULES = {
    'sequential': lambda: nn.Sequential(QuantConv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
    'bias': lambda: nn.Sequential(QuantConv2d(4, 6, 3, bias=True), nn.BatchNorm2d(6)),
    'groups': lambda: nn.Sequential(QuantConv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
    'transposed': lambda: nn.Sequential(
        QuantConvTranspose2d(4, 6, 2, stride=2, bias=False), nn.BatchNorm2d(6)
    ),
    'conv_module': lambda: ConvModule(
        4, 6, 3, conv_cfg=dict(type='QuantConv2d'), norm_cfg=dict(type='BN')
    ),
    'not_affine': lambda: nn.Sequential(QuantConv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)),
}


@pytest.mark.parametrize('kind', MODULES)
def test_folded_equals_unfolded_in_fake_quant(kind):
    model = MODULES[kind]()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.affine:
            randomise(model)
    model.eval()
    x = torch.randn(2, 4, 12, 12)
    calibrate(model, [x])
    folded = fold_bn(copy.deepcopy(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert relative(model(x), folded(x)) < 1e-5


def test_folding_a_resnet_is_exact():
    """In float64: in float32 a rounding tie flips here and there, and a deep net spreads it."""
    backbone = MODELS.build(dict(type='QuantResNet', depth=50, base_channels=8))
    randomise(backbone)
    x = torch.randn(1, 3, 64, 96)
    calibrate(backbone, [x])
    backbone.double()
    folded = fold_bn(copy.deepcopy(backbone))
    for a, b in strict_zip(backbone(x.double()), folded(x.double())):
        assert relative(a, b) < 1e-4


def test_a_batch_norm_that_follows_no_convolution_stays():
    model = nn.Sequential(nn.BatchNorm2d(4), QuantConv2d(4, 6, 1), nn.ReLU(), nn.BatchNorm2d(6))
    model.eval()
    fold_bn(model)
    assert isinstance(model[0], nn.BatchNorm2d) and isinstance(model[3], nn.BatchNorm2d)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match='1: it is in training mode'):
        fold_bn(nn.Sequential(QuantConv2d(4, 6, 1), nn.BatchNorm2d(6)))


def test_without_bn_for_a_while():
    model = randomise(MODELS.build(dict(type='QuantResNet', depth=18, out_indices=(3,))))
    set_mode(model, 'float')
    x = torch.randn(1, 3, 64, 64)
    before = dict(model.named_modules()), list(model.parameters())
    with torch.no_grad():
        expected = model(x)[0]
        with without_bn(model):
            assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
            assert relative(expected, model(x)[0]) < 1e-5
    after = dict(model.named_modules()), list(model.parameters())
    assert all(a is b for a, b in strict_zip(after[0].values(), before[0].values()))
    assert all(a is b for a, b in strict_zip(after[1], before[1]))
    assert torch.equal(model(x)[0], expected)


def test_a_norm_before_its_convolution_stays():
    norm_first = dict(order=('norm', 'act', 'conv'), norm_cfg=dict(type='BN'))
    model = randomise(ConvModule(4, 4, 3, conv_cfg=dict(type='QuantConv2d'), **norm_first))
    x = torch.randn(2, 4, 8, 8)
    set_mode(model, 'float')
    expected = model(x)
    assert torch.equal(fold_bn(model)(x), expected)


class OnVoxels(nn.Module):
    """A sparse module between values and values."""

    def __init__(self, module, kind=SparseConvTensor):
        super().__init__()
        self.module, self.kind = module, kind

    def forward(self, features):
        coords = few_voxels()[1]
        x = self.kind(features, coords, SHAPE, BATCH)
        for part in [self.module] if self.kind is SparseConvTensor else self.module:
            if isinstance(part, (nn.BatchNorm1d, nn.Identity)):  # mmcv's tensor has no spconv 2's
                x.features = part(x.features)
            else:
                x = part(x)
        return x.features


SPARSE = {
    'submanifold': lambda: make_sparse_convmodule(4, 4, 3, conv_type='QuantSubMConv3d'),
    'strided': lambda: make_sparse_convmodule(4, 6, 3, stride=2, conv_type='QuantSparseConv3d'),
    'norm first': lambda: make_sparse_convmodule(
        4, 4, 3, conv_type='QuantSubMConv3d', order=('norm', 'act', 'conv')
    ),
    'block': lambda: QuantSparseBasicBlock(4, 4),
    'mmcv': lambda: nn.Sequential(QuantMMCVSubMConv3d(4, 6, 1, bias=False), nn.BatchNorm1d(6)),
}


@pytest.mark.parametrize('run', [False, True])
@pytest.mark.parametrize('kind', SPARSE)
def test_sparse_convolutions_fold_exactly(kind, run):
    """In float64, so that no rounding tie blurs it; float and fake-quant, ranges included."""
    torch.manual_seed(0)
    tensor = MMCVTensor if kind == 'mmcv' else SparseConvTensor
    model = randomise(OnVoxels(SPARSE[kind](), tensor))
    x = few_voxels(torch.float64)[0]
    calibrate(model, [x.float()])
    model.double()
    folded = fold_bn(copy.deepcopy(model), (lambda m: m(x)) if run else None)
    left = [m for m in folded.modules() if isinstance(m, nn.BatchNorm1d)]
    assert len(left) == (1 if kind == 'norm first' else 0)
    assert relative(model(x), folded(x)) < 1e-6  # ranges are float32
    for m in (model, folded):
        set_mode(m, 'float')
    assert relative(model(x), folded(x)) < 1e-14
    pairs = strict_zip(model.modules(), folded.modules())
    for a, b in pairs:
        if hasattr(a, '_weight_quantizer'):
            whole = [m._weight_quantizer.amax * 0 + m.weight_amax() for m in (a, b)]
            assert torch.equal(whole[0], a._weight_quantizer.amax)
            torch.testing.assert_close(whole[1], b._weight_quantizer.amax)
            assert kind == 'norm first' or not torch.allclose(*whole)


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('block', BLOCKS)
def test_folding_a_sparse_encoder_is_exact(kind, block):
    torch.manual_seed(0)
    model = randomise(KINDS[kind][0](**kwargs_of(kind, block)))
    calibrate(model, [cloud(kind)])
    model.double()
    folded = fold_bn(copy.deepcopy(model))
    assert not any(isinstance(m, nn.BatchNorm1d) for m in folded.modules())
    inputs = cloud(kind, dtype=torch.float64)
    assert relative(model(*inputs), folded(*inputs)) < 1e-4
    with set_mode(model, 'float'), set_mode(folded, 'float'):
        expected = model(*inputs)
        assert relative(expected, folded(*inputs)) < 1e-14
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
        with without_bn(model):
            assert not any(isinstance(m, nn.BatchNorm1d) for m in model.modules())
            assert relative(expected, model(*inputs)) < 1e-14
        assert [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)] == norms
        assert torch.equal(model(*inputs), expected)


def test_spconv_s_own_layers_which_add_no_bias_on_a_cpu_keep_their_bn():
    """Those of a detector whose LiDAR branch is not ours, while it is calibrated."""
    conv = SubMConv3d(4, 8, 3, bias=False)
    model = SparseSequential(conv, nn.BatchNorm1d(8), nn.ReLU())
    randomise(model)
    model.eval()
    x = SparseConvTensor(torch.randn(3, 4), torch.zeros(3, 4, dtype=torch.int32), [4, 4, 4], 1)
    x.indices[:, 3] = torch.arange(3)
    with torch.no_grad():
        wanted = model(x).features
        with without_bn(model):
            assert model(x).features.equal(wanted)
