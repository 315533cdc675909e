"""Options of the parents: all of them lead to the quantized layer, and keep their meaning."""

import pytest
import torch
from mmdet.models import ResNet
from mmdet3d.registry import MODELS
from torch import nn

from mmdet3d_quant import calibrate, set_mode
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.export.manifest import describe_scales
from mmdet3d_quant.layers import QuantConv2d, QuantConvTranspose2d
from tests.models.small import VIEW

PLUGIN = dict(cfg=dict(type='ContextBlock', ratio=1.0 / 4), position='after_conv2')


@pytest.mark.parametrize(
    'options',
    [
        dict(depth=18),
        dict(depth=34),
        dict(depth=50),
        dict(depth=101),
        dict(depth=152),
        dict(depth=50, style='caffe'),
        dict(depth=50, deep_stem=True, avg_down=True),
        dict(depth=50, frozen_stages=2),
        dict(depth=50, frozen_stages=1, deep_stem=True),
        dict(depth=50, norm_eval=False),
        dict(depth=50, with_cp=True),
        dict(depth=50, plugins=[PLUGIN]),
        dict(depth=50, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,)),
        dict(depth=50, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
        dict(depth=50, norm_cfg=dict(type='GN', num_groups=2)),
        dict(depth=50, conv_cfg=dict(type='Conv2d')),
    ],
    ids=lambda o: '-'.join(f'{k}={v}' for k, v in o.items())[:50],
)
def test_resnet_options(options):
    torch.manual_seed(0)
    floating = ResNet(base_channels=4, **options)
    quantized = MODELS.build(dict(type='QuantResNet', base_channels=4, **options))
    keys = quantized.load_state_dict(floating.state_dict(), strict=False)
    assert not keys.unexpected_keys and all(k.endswith('._amax') for k in keys.missing_keys)
    x = torch.randn(2, 3, 64, 64)
    set_mode(quantized, 'float')
    for training in (True, False):
        floating.train(training)
        quantized.train(training)
        a, b = (m(x.clone().requires_grad_()) for m in (floating, quantized))
        assert all(torch.equal(i, j) for i, j in strict_zip(a, b))
    sum(o.square().mean() for o in a).backward()
    sum(o.square().mean() for o in b).backward()
    grads = dict(quantized.named_parameters())
    for name, parameter in floating.named_parameters():
        other = grads[name]
        assert parameter.requires_grad == other.requires_grad
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, other.grad, rtol=1e-4, atol=1e-7), name


def test_init_cfg_reaches_the_quantized_layers():
    """Kaiming for 'Conv2d' and zero-initialised residuals, as for the float parent."""
    stats = []
    for build in (ResNet, lambda **kw: MODELS.build(dict(type='QuantResNet', **kw))):
        torch.manual_seed(0)
        model = build(depth=50, base_channels=8)
        model.init_weights()
        stats.append({k: v for k, v in model.state_dict().items() if '_amax' not in k})
    assert all(torch.equal(v, stats[1][k]) for k, v in stats[0].items())
    assert (stats[1]['layer1.0.bn3.weight'] == 0).all()


def test_dcn_and_foreign_convolutions_are_refused():
    with pytest.raises(ValueError, match='deformable'):
        MODELS.build(
            dict(
                type='QuantResNet',
                depth=50,
                dcn=dict(type='DCNv2'),
                stage_with_dcn=(False, True, True, True),
            )
        )
    with pytest.raises(ValueError, match="'DCNv2' cannot be quantized.*'Conv2d'"):
        MODELS.build(dict(type='QuantResNet', depth=50, conv_cfg=dict(type='DCNv2')))


SECOND = dict(type='QuantSECOND', in_channels=4, out_channels=[4], layer_nums=[1])


@pytest.mark.parametrize(
    'conv_cfg, bias',
    [
        ({}, False),
        (dict(conv_cfg=dict(type='Conv2d', bias=False)), False),
        (dict(conv_cfg=dict(type='QuantConv2d', bias=False)), False),
        (dict(conv_cfg=None), True),
    ],
)
def test_second_takes_the_float_conv_cfg(conv_cfg, bias):
    model = MODELS.build(dict(**SECOND, layer_strides=[1], **conv_cfg))
    conv = model.blocks[0][0]
    assert isinstance(conv, QuantConv2d) and (conv.bias is not None) == bias
    torch.manual_seed(0)
    model.init_weights()
    assert conv.weight.std() > 0.15  # kaiming for 4 input channels, not torch's default


def test_secondfpn_takes_the_float_upsample_cfg():
    for cfg in ({}, dict(upsample_cfg=dict(type='deconv', bias=False))):
        neck = MODELS.build(
            dict(
                type='QuantSECONDFPN',
                in_channels=[4],
                out_channels=[4],
                upsample_strides=[2],
                **cfg,
            )
        )
        assert isinstance(neck.deblocks[0][0], QuantConvTranspose2d)
        assert neck.deblocks[0][0].bias is None


def test_positional_arguments_are_those_of_the_parent():
    from mmdet3d_quant.models import QuantResNet, QuantSECOND

    assert isinstance(QuantSECOND(4, [4], [1], [1]).blocks[0][0], QuantConv2d)
    assert QuantResNet(18, 4).conv1.in_channels == 4
    with pytest.raises(TypeError, match='SECOND'):
        QuantSECOND(4, layers=3)


def test_downsample_is_float_unless_asked():
    for asked in (False, True):
        view = MODELS.build(dict(type='QuantDepthLSSTransform', **VIEW, quantize_downsample=asked))
        kinds = {type(m) for m in view.downsample if isinstance(m, nn.Conv2d)}
        assert kinds == ({QuantConv2d} if asked else {nn.Conv2d})


def test_quantized_training_step_trains_the_master_weights():
    model = MODELS.build(dict(type='QuantResNet', depth=18, base_channels=4, norm_eval=False))
    x = torch.randn(2, 3, 64, 64)
    calibrate(model, [x], 'max')
    model.train()
    before = model.layer1[0].conv1.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(o.square().mean() for o in model(x)).backward()
    optimizer.step()
    after = model.layer1[0].conv1.weight.detach()
    assert not torch.equal(before, after)
    assert len(after.unique()) == after.numel()  # master weights, not values on a grid


def test_a_far_return_does_not_widen_the_steps_of_the_depth_map():
    view = MODELS.build(dict(type='QuantDepthLSSTransform', **VIEW))
    quantizer = view.dtransform[0]._input_quantizer
    depth = torch.rand(1, 2, 1, 32, 64) * 9
    x, found = torch.randn(1, 2, 8, 4, 8), {}

    def run(model, inputs):
        return model.lift(*inputs), model.downsample(x[:, 0, :6])

    for far in (9.0, 200.0):
        depth[0, 0, 0, 0, 0] = far
        for method in ('max', 'mse'):
            result = calibrate(view, [(x, depth)], method, forward=run)
            found[far, method] = float(quantizer.amax)
    assert set(found.values()) == {9.0}  # where dbound ends
    told = {r.name: r.method for r in result.ranges}
    assert told['dtransform.0._input_quantizer'] == 'known: end of the depth bins, dbound'
    (scale,) = (e for e in describe_scales(view) if 'dtransform.0' in e['quantizers'][0])
    assert scale['known'] == 'end of the depth bins, dbound' and scale['amax'] == 9
    calibrate(view, [(x, depth)], 'dtransform.0=max', forward=run)
    assert float(quantizer.amax) == 200
    assert all('known' not in e for e in describe_scales(view))
