"""Layers: where OpenMMLab code accepts them, and their arithmetic against stock ones."""

import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer, build_upsample_layer
from pytorch_quantization import nn as library
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.layers import (
    QuantAdd,
    QuantConcat,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
)


def test_registered_where_openmmlab_looks():
    conv = build_conv_layer(dict(type='QuantConv2d'), 3, 4, 3, padding=1)
    up = build_upsample_layer(
        dict(type='QuantConvTranspose2d', bias=False),
        in_channels=3,
        out_channels=4,
        kernel_size=2,
        stride=2,
    )
    module = ConvModule(3, 4, 3, conv_cfg=dict(type='QuantConv2d'), norm_cfg=dict(type='BN'))
    assert type(conv) is QuantConv2d and type(up) is QuantConvTranspose2d
    assert type(module.conv) is QuantConv2d


@pytest.mark.parametrize(
    'ours, theirs, kwargs, shape',
    [
        (QuantConv2d, library.QuantConv2d, dict(in_channels=5, out_channels=7, kernel_size=3), 4),
        (
            QuantConvTranspose2d,
            library.QuantConvTranspose2d,
            dict(in_channels=5, out_channels=7, kernel_size=2, stride=2),
            4,
        ),
        (QuantLinear, library.QuantLinear, dict(in_features=5, out_features=7), 2),
    ],
)
def test_same_ranges_same_result_as_stock_pytorch_quantization(ours, theirs, kwargs, shape):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, 12) if shape == 4 else torch.randn(9, 5)
    a = ours(**kwargs)
    calibrate(a, [x], 'mse')
    b = theirs(**kwargs)
    b.load_state_dict({k: v for k, v in a.state_dict().items() if '_amax' not in k}, strict=False)
    b._input_quantizer.amax = a._input_quantizer.amax.numpy()
    b._weight_quantizer.amax = a._weight_quantizer.amax.numpy()
    assert torch.allclose(a(x), b(x), rtol=1e-4, atol=1e-5)


def test_stock_checkpoints_share_our_keys():
    ours, theirs = QuantConv2d(3, 4, 1), library.QuantConv2d(3, 4, 1)
    theirs._input_quantizer.amax = 1.0
    theirs._weight_quantizer.amax = torch.ones(4, 1, 1, 1).numpy()
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert ours._input_quantizer.calibrated and ours._weight_quantizer.calibrated


def test_transposed_convolution_rounds_each_output_channel_on_its_own_grid():
    conv = QuantConvTranspose2d(3, 2, 2, bias=False)
    conv.weight.data[:, 1] *= 100
    calibrate(conv, [torch.randn(1, 3, 4, 4)], 'max')
    for channel in range(2):
        weight = conv.weight.detach()[:, channel]
        step = weight.abs().max() / 127
        rounded = (weight / step).round() * step
        assert torch.allclose(conv._weight_quantizer(conv.weight)[:, channel], rounded, atol=1e-6)


@pytest.mark.parametrize('dim', [0, 1, 3])
@pytest.mark.parametrize('count', [1, 2, 4])
def test_concat_of_any_number_along_any_dimension(dim, count):
    concat = QuantConcat(dim)
    tensors = [torch.randn(2, 3, 4, 5) * (i + 1) for i in range(count)]
    calibrate(concat, [[tensors]], 'max')
    step = max(t.abs().max() for t in tensors) / 127
    expected = torch.cat([(t / step).round() * step for t in tensors], dim)
    assert torch.allclose(concat(tensors), expected, atol=1e-5)


def test_output_size_of_a_transposed_convolution():
    a = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1)
    b = QuantConvTranspose2d(3, 4, 3, stride=2, padding=1)
    b.load_state_dict(a.state_dict(), strict=False)
    x = torch.randn(1, 3, 5, 5)
    from mmdet3d_quant import set_mode

    set_mode(b, 'float')
    assert torch.equal(a(x, output_size=[10, 10]), b(x, output_size=[10, 10]))


def test_add_rounds_both_inputs_on_one_grid():
    add = QuantAdd()
    a, b = torch.randn(20, 4) * 5, torch.randn(20, 4)
    calibrate(add, [[a, b]], 'max')
    step = max(a.abs().max(), b.abs().max()) / 127
    wanted = (a / step).round() * step + (b / step).round() * step
    assert torch.allclose(add(a, b), wanted, atol=1e-5)
    sum_in_steps = add(a, b) / step  # what an engine adds: integers
    assert torch.allclose(sum_in_steps, sum_in_steps.round(), atol=1e-3)
