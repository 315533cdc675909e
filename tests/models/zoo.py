"""Float modules of several families, small: inputs, and numbers of adds and concats inside."""

import torch

from tests.models import osa  # noqa: F401 - registers its backbone


def image(channels=3, size=64):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def pyramid(*channels, size=32):
    return [image(c, size >> i) for i, c in enumerate(channels)]


def _stage(branches, block='BASIC'):
    return dict(
        num_modules=1,
        num_branches=branches,
        block=block,
        num_blocks=(1,) * branches,
        num_channels=tuple(4 << i for i in range(branches)),
    )


HRNET = dict(
    type='mmdet.HRNet',
    extra=dict(
        stage1=_stage(1, 'BOTTLENECK'), stage2=_stage(2), stage3=_stage(3), stage4=_stage(4)
    ),
)
SWIN = dict(
    type='mmdet.SwinTransformer',
    embed_dims=16,
    depths=[2, 2],
    num_heads=[2, 4],
    strides=(4, 2),
    out_indices=(0, 1),
)
#: Config, argument of the forward, number of adds and of concats that have a quantizer.
ZOO = {
    'ResNet-18': (dict(type='mmdet.ResNet', depth=18, base_channels=8), image(), 8, 0),
    'ResNet-50': (dict(type='mmdet.ResNet', depth=50, base_channels=4), image(), 16, 0),
    'RegNet': (dict(type='mmdet.RegNet', arch='regnetx_400mf'), image(), 22, 0),
    'DLA-34': (
        dict(type='DLANet', depth=34, in_channels=3, norm_cfg=dict(type='BN')),
        image(),
        12,
        6,
    ),
    'MobileNetV2': (dict(type='mmdet.MobileNetV2', widen_factor=0.25), image(), 11, 0),
    'CSPDarknet': (
        dict(type='mmdet.CSPDarknet', deepen_factor=0.34, widen_factor=0.125),
        image(),
        7,
        6,
    ),
    'HRNet': (HRNET, image(), 30, 0),
    'Swin': (SWIN, image(), 0, 0),
    'VoVNet': (dict(type='SmallOSA'), image(), 1, 2),
    'DLANeck': (
        dict(type='DLANeck', in_channels=[4, 8, 16], start_level=0, end_level=3, use_dcn=False,
             norm_cfg=dict(type='GN', num_groups=2)),
        pyramid(4, 8, 16),
        5,  # 1 + 2 of the levels, 2 of what they made
        0,
    ),
    'SECOND': (
        dict(type='SECOND', in_channels=8, out_channels=[8, 16], layer_nums=[1, 2],
             layer_strides=[1, 2]),
        image(8),
        0,
        0,
    ),
    'FPN': (
        dict(type='mmdet.FPN', in_channels=[4, 8, 16], out_channels=8, num_outs=4),
        pyramid(4, 8, 16),
        2,
        0,
    ),
    'PAFPN': (
        dict(type='mmdet.PAFPN', in_channels=[4, 8, 16], out_channels=8, num_outs=3),
        pyramid(4, 8, 16),
        4,
        0,
    ),
    'YOLOXPAFPN': (
        dict(type='mmdet.YOLOXPAFPN', in_channels=[8, 16, 32], out_channels=8,
             num_csp_blocks=1),
        pyramid(8, 16, 32),
        0,
        8,
    ),
    'SECONDFPN': (
        dict(type='SECONDFPN', in_channels=[8, 16], out_channels=[8, 8],
             upsample_strides=[1, 2]),
        pyramid(8, 16),
        0,
        0,
    ),
    'LSSFPN': (
        dict(type='GeneralizedLSSFPN', in_channels=[4, 8, 16], out_channels=8, num_outs=3),
        pyramid(4, 8, 16),
        0,
        2,
    ),
}  # fmt: skip
