"""Quantized sparse convolutions: against dense ones, stock quantizers, and what ruins training."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import SparseConvTensor as MMCVTensor
from mmcv.ops import sparse_conv as mmcv_sparse
from mmdet3d.models.layers import SparseBasicBlock, make_sparse_convmodule
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from spconv.pytorch import SparseConvTensor
from torch import nn

from mmdet3d_quant import calibrate, set_mode
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.fake_quant import fake_quantize
from mmdet3d_quant.layers import (
    QuantMMCVSparseConv3d,
    QuantMMCVSubMConv3d,
    QuantSparseConv3d,
    QuantSubMConv3d,
)
from mmdet3d_quant.layers.features import values, with_values
from mmdet3d_quant.parents.sparse_conv import PortableSparseConv3d, PortableSubMConv3d, rulebook
from mmdet3d_quant.parents.sparse_layout import accept_any_layout, rearranged
from tests.parents.small import BATCH, SHAPE, cloud, dense

CASES = {
    'submanifold': (QuantSubMConv3d, dict(kernel_size=3, padding=1, bias=True)),
    'strided': (QuantSparseConv3d, dict(kernel_size=3, stride=2, padding=1, bias=False)),
    'flat': (QuantSparseConv3d, dict(kernel_size=(1, 1, 3), stride=(1, 1, 2), bias=True)),
    'uneven': (QuantSparseConv3d, dict(kernel_size=3, stride=2, padding=(1, 1, 0), bias=False)),
}


def sparse(feats, coords, kind=SparseConvTensor):
    return kind(feats, coords, SHAPE, BATCH)


def build(name, dtype=torch.float32, channels=4):
    torch.manual_seed(0)
    kind, kwargs = CASES[name]
    conv = kind(channels, 6, **kwargs)
    with torch.no_grad():
        conv.weight *= torch.rand(6, 1, 1, 1, 1) * 5 + 0.1  # each output channel on its own scale
    feats, coords = cloud(dtype)
    calibrate(conv, [sparse(feats.float(), coords)], forward=lambda m, x: m(x))
    return conv.to(dtype), feats, coords


def brute_force(x, amax):
    """Rounding to the grid, written out."""
    step = amax / 127
    return (x / step).round().clamp(-128, 127) * step


@pytest.mark.parametrize('name', CASES)
def test_equals_a_dense_convolution_of_rounded_tensors(name):
    conv, feats, coords = build(name, torch.float64)
    out = conv(sparse(feats, coords))
    plain = nn.Module()
    plain.kernel_size, plain.subm = conv.kernel_size, conv.subm
    plain.padding, plain.stride, plain.bias = conv.padding, conv.stride, conv.bias
    limits = conv.weight.detach().abs().amax((1, 2, 3, 4), keepdim=True)
    plain.weight = brute_force(conv.weight, limits.float().double())
    rounded = brute_force(feats, conv._input_quantizer.amax)
    wanted = dense(plain, rounded, coords, out.indices)
    torch.testing.assert_close(out.features, wanted, atol=1e-12, rtol=1e-12)
    with set_mode(conv, 'float'):
        assert not torch.allclose(conv(sparse(feats, coords)).features, wanted, rtol=1e-3)


@pytest.mark.parametrize('name', CASES)
def test_gradients_are_those_of_the_dense_convolution(name):
    conv, feats, coords = build(name, torch.float64)
    results = []
    for is_sparse in (True, False):
        x = feats.clone().requires_grad_()
        if is_sparse:
            out = conv(sparse(x, coords))
            out, where = out.features, out.indices
            upstream = torch.randn_like(out)
        else:
            inputs, weights = conv._input_quantizer, conv._weight_quantizer
            plain = nn.Module()
            plain.kernel_size, plain.subm = conv.kernel_size, conv.subm
            plain.padding, plain.stride, plain.bias = conv.padding, conv.stride, conv.bias
            plain.weight = fake_quantize(conv.weight, weights.amax, weights.spec)
            rounded = fake_quantize(x, inputs.amax, inputs.spec)
            out = dense(plain, rounded, coords, where)
        params = [p for p in (x, conv.weight, conv.bias) if p is not None]
        results.append(torch.autograd.grad(out, params, upstream))
    for ours, wanted in strict_zip(*results):
        torch.testing.assert_close(ours, wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize('name', CASES)
def test_same_ranges_same_result_as_stock_pytorch_quantization(name):
    conv, feats, coords = build(name)
    out = conv(sparse(feats, coords))
    inputs = TensorQuantizer(QuantDescriptor(num_bits=8))
    weights = TensorQuantizer(QuantDescriptor(num_bits=8, axis=0))
    inputs.amax = conv._input_quantizer.amax.numpy()
    weights.amax = conv._weight_quantizer.amax.numpy()
    stock = {QuantSubMConv3d: PortableSubMConv3d, QuantSparseConv3d: PortableSparseConv3d}
    plain = stock[type(conv)](4, 6, **CASES[name][1])
    with torch.no_grad():
        plain.weight.copy_(weights(conv.weight))
        if conv.bias is not None:
            plain.bias.copy_(conv.bias)
    wanted = plain(sparse(inputs(feats), coords)).features
    torch.testing.assert_close(out.features, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('name', CASES)
def test_float_mode_equals_the_parent_in_training_too(name):
    conv, feats, coords = build(name)
    stock = {QuantSubMConv3d: PortableSubMConv3d, QuantSparseConv3d: PortableSparseConv3d}
    plain = stock[type(conv)](4, 6, **CASES[name][1])
    _copy(conv, plain)
    set_mode(conv, 'float')
    results = []
    for layer in (conv, plain):
        x = feats.clone().requires_grad_()
        out = layer(sparse(x, coords)).features
        out.square().sum().backward()
        results.append([out, x.grad, layer.weight.grad])
    assert all(torch.equal(a, b) for a, b in strict_zip(*results))


def _copy(source, target):
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(getattr(source, name))


def test_registered_where_mmdet3d_looks():
    module = make_sparse_convmodule(
        4, 6, 3, indice_key='a', stride=2, padding=1, conv_type='QuantSparseConv3d'
    )
    block = SparseBasicBlock(6, 6, conv_cfg=dict(type='QuantSubMConv3d'))
    assert type(module[0]) is QuantSparseConv3d and module[0].stride == [2, 2, 2]
    assert type(block.conv1) is QuantSubMConv3d and block.conv2.bias is None


def test_a_thousand_steps_train_the_weight_and_not_its_rounded_copy():
    """The step of a weight is 1/400 of a step of its grid: none of a rounded copy would be left."""
    torch.manual_seed(0)
    conv = QuantSubMConv3d(2, 3, 3, padding=1, bias=False)
    feats, coords = torch.rand(40, 2) + 0.5, cloud()[1][:40]
    calibrate(conv, [sparse(feats, coords)], forward=lambda m, x: m(x))
    weight, before = conv.weight, conv.weight.detach().clone()
    conv._weight_quantizer.amax = conv._weight_quantizer.amax * 1.9  # room to move
    step = conv._weight_quantizer.amax / 127
    integers = (before / step).round()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    crossed = []
    for _ in range(1000):
        optimizer.zero_grad()
        conv(sparse(feats, coords)).features.sum().backward()
        reached = weight.grad != 0
        weight.grad = weight.grad.sign() * step / 400
        optimizer.step()
        crossed.append(int((conv._weight_quantizer(weight) / step).round().ne(integers).sum()))
    assert conv.weight is weight and isinstance(weight, nn.Parameter)
    assert reached.sum() > 20
    moved = (weight.detach() - before) / step
    torch.testing.assert_close(moved[reached], torch.full_like(moved[reached], -2.5), atol=1e-2,
                               rtol=0)  # fmt: skip
    off_grid = (weight.detach() / step - (weight.detach() / step).round()).abs()
    assert (off_grid[reached] > 1e-3).float().mean() > 0.95
    assert crossed[0] < 3 and crossed[-1] == int(reached.sum())


def test_ranges_depend_on_active_sites_only():
    """Not on the size of the grid, nor on where the voxels are or in which order they come."""
    ranges = []
    feats, coords = cloud()
    for shape, shift, order in [
        (SHAPE, 0, slice(None)),
        ([400, 300, 40], 20, slice(None)),
        (SHAPE, 0, torch.randperm(len(feats))),
    ]:
        torch.manual_seed(0)
        conv = QuantSubMConv3d(4, 6, 3, padding=1)
        moved = coords[order] + torch.tensor([0, shift, shift, shift], dtype=torch.int32)
        x = SparseConvTensor(feats[order], moved, shape, BATCH)
        calibrate(conv, [x], 'percentile:99', forward=lambda m, x: m(x))
        ranges.append(conv._input_quantizer.amax)
    assert ranges[0] < feats.abs().max()
    assert ranges[0] == ranges[1] == ranges[2]
    found = torch.quantile(feats.abs(), 0.99)
    torch.testing.assert_close(ranges[0], found, rtol=0.05, atol=0)


@pytest.mark.parametrize('name', CASES)
def test_an_empty_tensor_stays_one(name):
    conv, feats, coords = build(name)
    for mode in ('quant', 'observe', 'float'):
        with set_mode(conv, mode), torch.no_grad():
            x = conv._quantized(sparse(feats[:0], coords[:0]))
        assert x.features.shape == (0, 4)


def test_values_of_any_tensor():
    feats, coords = cloud()
    for x in (feats, sparse(feats, coords), sparse(feats, coords, MMCVTensor)):
        y = with_values(x, feats * 2)
        assert type(y) is type(x) and torch.equal(values(y), feats * 2)
        assert values(x) is feats  # as it was


class MMCVOnCPU:
    """mmcv's two operators, which have no CPU version, in plain torch with spconv's rules."""

    @staticmethod
    def pairs(indices, batch_size, spatial_shape, ksize, stride, padding, dilation, out_padding,
              subm, transpose, grid=None):  # fmt: skip
        kind = PortableSubMConv3d if subm else PortableSparseConv3d
        conv = kind(1, 1, ksize, stride, padding, dilation, bias=False)
        x = SparseConvTensor(torch.zeros(len(indices), 1), indices, spatial_shape, batch_size)
        rules = rulebook(conv, x)
        pairs = torch.stack([rules.source, rules.target])
        return rules.outputs, pairs, torch.tensor(rules.counts)

    @staticmethod
    def convolve(features, filters, pairs, counts, num_out):
        out = features.new_zeros(num_out, filters.shape[-1])
        weights = filters.flatten(0, 2).repeat_interleave(counts, 0)
        return out.index_add(0, pairs[1], (features[pairs[0]].unsqueeze(1) @ weights)[:, 0])


@pytest.fixture
def mmcv_on_cpu(monkeypatch):
    monkeypatch.setattr(mmcv_sparse.ops, 'get_indice_pairs', MMCVOnCPU.pairs)
    monkeypatch.setattr(mmcv_sparse.Fsp, 'indice_subm_conv', MMCVOnCPU.convolve)
    monkeypatch.setattr(mmcv_sparse.Fsp, 'indice_conv', MMCVOnCPU.convolve)


@pytest.mark.usefixtures('mmcv_on_cpu')
@pytest.mark.parametrize('name', CASES)
def test_mmcv_computes_the_same_from_its_layout(name):
    """Its forward and ours around it; the operators below are replaced, they need a GPU."""
    ours, feats, coords = build(name)
    theirs = {QuantSubMConv3d: QuantMMCVSubMConv3d, QuantSparseConv3d: QuantMMCVSparseConv3d}
    conv = theirs[type(ours)](4, 6, **CASES[name][1])
    _copy_layout(ours, conv)
    weight = conv.weight
    x = sparse(feats, coords, MMCVTensor)
    out, wanted = conv(x), ours(sparse(feats, coords))
    where = {tuple(c): i for i, c in enumerate(wanted.indices.tolist())}
    rows = [where[tuple(c)] for c in out.indices.tolist()]
    torch.testing.assert_close(out.features, wanted.features[rows], atol=1e-5, rtol=1e-5)
    assert x.features is feats
    out.features.sum().backward()
    wanted.features.sum().backward()
    assert conv.weight is weight
    torch.testing.assert_close(
        rearranged(conv.weight.grad, 'spconv2'), ours.weight.grad, atol=1e-4, rtol=1e-4
    )
    set_mode(conv, 'float')
    kind = mmcv_sparse.SubMConv3d if ours.subm else mmcv_sparse.SparseConv3d
    plain = kind(4, 6, **CASES[name][1])
    _copy(conv, plain)
    x = sparse(feats, coords, MMCVTensor)
    y = sparse(feats, coords, MMCVTensor)
    assert torch.equal(conv(x).features, plain(y).features)


def _copy_layout(source, target):
    accept_any_layout(target)
    target.load_state_dict(source.state_dict())


@pytest.mark.parametrize('kinds', [
    (QuantSubMConv3d, QuantMMCVSubMConv3d), (QuantMMCVSparseConv3d, QuantSparseConv3d),
])  # fmt: skip
def test_calibrated_weights_go_from_one_library_to_the_other_and_back(kinds):
    a, b, c = kinds[0](4, 6, 3), kinds[1](4, 6, 3), kinds[0](4, 6, 3)
    a._input_quantizer.amax = 3.0
    a._weight_quantizer.amax = torch.arange(1.0, 7.0)
    for source, target in ((a, b), (b, c)):
        _copy_layout(source, target)
    assert b._weight_quantizer.amax.flatten().tolist() == [1, 2, 3, 4, 5, 6]
    for channel in range(6):
        mine, theirs = (m.weight.select(m.weight_axis, channel) for m in (a, b))
        assert torch.equal(mine, theirs)
    assert all(torch.equal(v, a.state_dict()[k]) for k, v in c.state_dict().items())
    assert c._weight_quantizer.calibrated and c._input_quantizer.calibrated


def test_without_spconv_mmcv_takes_its_place():
    code = """
import sys
sys.modules['spconv'] = sys.modules['spconv.pytorch'] = None
import torch
import mmdet3d_quant as mq
from mmengine.registry import MODELS
from mmdet3d.registry import MODELS as MODELS3D
from mmdet3d_quant.layers import QuantMMCVSubMConv3d, QuantSubMConv3d
assert QuantSubMConv3d is QuantMMCVSubMConv3d is MODELS.get('QuantSubMConv3d')
for name in ('QuantBEVFusionSparseEncoder', 'QuantSparseEncoder'):
    model = MODELS3D.build(dict(type=name, in_channels=5, sparse_shape=[48, 48, 48],
                                block_type='basicblock')).eval()
    kinds = {type(m).__name__ for m in model.modules() if 'Conv3d' in type(m).__name__}
    assert kinds == {'QuantMMCVSubMConv3d', 'QuantMMCVSparseConv3d'}, kinds
    assert mq.fold_bn(model).conv_out[0].bias is not None
    state = {k: (v.permute(4, 0, 1, 2, 3) if v.dim() == 5 and 'amax' not in k else v).clone()
             for k, v in model.state_dict().items()}
    wanted = model.conv_out[0].weight.clone()
    model.conv_out[0].weight.data.zero_()
    model.load_state_dict(state)
    assert torch.equal(model.conv_out[0].weight, wanted)
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_site_without_neighbours_meets_the_middle_weight_alone():
    conv = QuantSubMConv3d(4, 6, 3, padding=1)
    feats = torch.randn(1, 4)
    x = sparse(feats, torch.tensor([[0, 1, 1, 1]], dtype=torch.int32))
    calibrate(conv, [x], 'max', forward=lambda m, x: m(x))
    middle = conv._weight_quantizer(conv.weight)[:, 1, 1, 1]
    wanted = F.linear(conv._input_quantizer(feats), middle, conv.bias)
    torch.testing.assert_close(conv(x).features, wanted)
