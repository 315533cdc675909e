"""How much is quantized: multiply-accumulates counted by hand, what stays float, and why."""

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import ModulatedDeformConv2dPack
from mmcv.ops import SubMConv3d as MMCVSubMConv3d
from spconv.pytorch import SparseConvTensor
from torch import nn

from mmdet3d_quant import calibrate, set_mode
from mmdet3d_quant.core.coverage import coverage, float_parts
from mmdet3d_quant.core.macs import counting
from mmdet3d_quant.core.modes import keep_float
from mmdet3d_quant.core.skip import covering
from mmdet3d_quant.layers import QuantConv2d, QuantLinear, QuantSparseConv3d, QuantSubMConv3d
from tests.parents.small import BATCH, SHAPE, cloud

COUNTED = {
    # outputs x inputs of each
    'conv1d': (nn.Conv1d(4, 6, 3), (2, 4, 10), (2 * 6 * 8) * (4 * 3)),
    'conv2d': (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 7), (2 * 6 * 5 * 4) * (4 * 9)),
    'quantized': (QuantConv2d(4, 6, 1), (1, 4, 5, 5), (6 * 25) * 4),
    'dilated': (nn.Conv2d(1, 1, 3, dilation=2), (1, 1, 6, 5), (2 * 1) * 9),
    'grouped': (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 5, 5), (6 * 9) * (2 * 9)),
    'depthwise': (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5), (4 * 9) * 9),
    'conv3d': (nn.Conv3d(2, 3, (1, 2, 3)), (1, 2, 4, 4, 4), (3 * 4 * 3 * 2) * (2 * 6)),
    # inputs x outputs of each
    'transposed': (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 3), (2 * 4 * 15) * (6 * 4)),
    'transposed, grouped': (
        nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
        (1, 4, 5, 5),
        (4 * 25) * (3 * 4),
    ),
    'linear': (nn.Linear(4, 6, bias=False), (2, 7, 5, 4), (2 * 7 * 5) * (4 * 6)),
}


@pytest.mark.parametrize('name', COUNTED)
def test_multiply_accumulates_are_those_counted_by_hand(name):
    layer, shape, wanted = COUNTED[name]
    model = nn.Sequential(layer)
    with set_mode(model, 'float'), counting(model) as counted, torch.no_grad():
        model(torch.zeros(shape))
    assert counted.macs == {'0': wanted}
    assert not layer._forward_hooks


def test_a_layer_that_is_called_twice_counts_twice():
    layer = nn.Linear(4, 4)
    with counting(nn.Sequential(layer, nn.ReLU(), layer)) as counted:
        nn.Sequential(layer, nn.ReLU(), layer)(torch.zeros(3, 4))
    assert counted.macs == {'0': 2 * 3 * 16}


@pytest.mark.parametrize(
    'kind, kwargs',
    [
        (QuantSubMConv3d, dict(kernel_size=3, padding=1)),
        (QuantSparseConv3d, dict(kernel_size=3, stride=2, padding=1)),
        (QuantSparseConv3d, dict(kernel_size=1)),
    ],
)
def test_sparse_layers_count_the_pairs_of_voxels_that_meet(kind, kwargs):
    feats, coords = cloud(torch.float32)
    conv = kind(feats.shape[1], 6, bias=True, **kwargs)
    keep_float(conv, '*')
    with counting(nn.Sequential(conv)) as counted, torch.no_grad():
        out = conv(SparseConvTensor(feats, coords, SHAPE, BATCH))
    full = torch.zeros(BATCH, 1, *SHAPE)
    full[coords[:, 0].long(), 0, coords[:, 1].long(), coords[:, 2].long(), coords[:, 3].long()] = 1
    size, options = kwargs['kernel_size'], {k: v for k, v in kwargs.items() if k != 'kernel_size'}
    seen = F.conv3d(full, torch.ones(1, 1, size, size, size), **options)[:, 0]
    pairs = int(seen[tuple(out.indices.long().T)].sum())
    assert pairs > len(coords) // 2 and counted.macs == {'0': pairs * feats.shape[1] * 6}


def test_what_cannot_be_counted_is_named():
    feats, coords = cloud(torch.float32)
    model = nn.Sequential(MMCVSubMConv3d(feats.shape[1], 6, 3), nn.Linear(2, 2))
    known = coverage(model, {'1': 8})
    assert known.uncounted == ['0'] and '(without 1 layer(s)' in known.summary()
    assert coverage(model).share is None
    assert 'were not counted' in coverage(model).summary()


class Detector(nn.Module):
    """A backbone of float types, a neck with one layer kept float, a head."""

    def __init__(self):
        super().__init__()
        self.img_backbone = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1))
        self.neck = nn.Sequential(QuantConv2d(4, 4, 1), QuantConv2d(4, 4, 1))
        self.bbox_head = nn.Linear(4, 3)
        keep_float(self.neck, {'1': 'too wide'})

    def forward(self, x):
        return self.bbox_head(self.neck(self.img_backbone(x)).mean((2, 3)))


def test_calibration_tells_the_share_and_what_stays_float():
    found = calibrate(Detector(), [torch.randn(1, 2, 5, 5), torch.randn(3, 2, 5, 5)]).coverage
    macs = [25 * 8, 25 * 16, 25 * 16, 25 * 16, 12]
    assert [layer.macs for layer in found.layers] == macs  # of the first batch, once
    assert found.share == macs[2] / sum(macs)
    assert found.summary() == '1 of 5 layers quantized, 28.3 % of the multiply-accumulates'
    assert found.lines() == [
        'float: img_backbone (2 layers, 42.5 %): its type is not quantized (Conv2d)',
        'float: neck.1 (1 layer, 28.3 %): too wide',
        'float: bbox_head (1 layer, 0.8 %): its type is not quantized (Linear)',
    ]
    assert found.plain()['float'][0]['layers'] == ['img_backbone.0', 'img_backbone.1']


def test_modules_that_stay_float_for_one_reason_are_one_line():
    model = nn.Sequential(*(QuantConv2d(1, 1, 1) for _ in range(10)))
    keep_float(model, {f'{i}': 'odd' for i in (1, 3, 5, 7, 9)})
    found = coverage(model, {str(i): 10 for i in range(10)})
    assert found.lines() == ['float: 1, 3, 5 and 2 more (5 layers, 50.0 %): odd']
    assert found.plain()['lines'] == found.lines() and len(found.plain()['float']) == 5


class Own(nn.Module):
    """A convolution of no known type."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight)


def test_convolutions_that_derive_from_none_count_as_float():
    model = nn.Sequential(
        ModulatedDeformConv2dPack(4, 4, 3, padding=1), Own(), nn.LayerNorm([6, 3, 3])
    )
    with counting(model) as counted, torch.no_grad():
        model(torch.zeros(1, 4, 5, 5))
    assert counted.macs == {'0': 4 * 25 * 36, '0.conv_offset': 27 * 25 * 36, '1': 6 * 9 * 36}
    assert [layer.reason is None for layer in coverage(model).layers] == [False] * 3


def test_a_float_part_is_warned_of_until_it_is_meant():
    model = Detector()
    (warning,) = float_parts(model, coverage(model))
    assert warning.startswith('img_backbone stays float: its type is not quantized (Conv2d).')
    assert "type='Quantized', of='Detector', skip={'img_backbone': 'why'}" in warning
    keep_float(model, {'img_backbone': 'another team has it'})
    found = coverage(model)
    assert not float_parts(model, found)
    assert 'float: img_backbone (2 layers): another team has it' in found.lines()
    with pytest.raises(ValueError, match="'img_backbon' matches no"):
        keep_float(model, 'img_backbon')


def test_half_a_layer_kept_float_is_float():
    layer = QuantLinear(2, 2)
    keep_float(layer, {'_input_quantizer': 'half'})
    assert coverage(nn.Sequential(layer)).layers[0].reason == 'half'


def test_groups_stop_below_what_is_of_both_kinds():
    among = ['a.x.1', 'a.x.2', 'a.y.1', 'b.1', 'c']
    assert covering(['a.x.1', 'a.x.2', 'b.1'], among) == {'a.x': ['a.x.1', 'a.x.2'], 'b': ['b.1']}
    assert covering(among, among) == {'*': among}
    assert covering([], []) == {}
