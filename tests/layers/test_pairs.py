"""Which batch norm is folded where, by what each reads: results of whole modules, in float64."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmdet3d.models.layers.norm import NaiveSyncBatchNorm1d, NaiveSyncBatchNorm2d
from torch import nn

from mmdet3d_quant import calibrate, fold_bn, set_mode
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.layers import QuantConvTranspose2d, QuantLinear
from mmdet3d_quant.layers.fold import fold_known, without_bn
from tests.layers.nets import (
    Net,
    bn,
    conv,
    crossed,
    norms_of,
    odd,
    randomise,
    read_twice,
    relative,
    spread,
)

X = torch.randn(2, 4, 9, 11, generator=torch.Generator().manual_seed(0))


def lists():
    """A convolution per part and lists of norms, as Res2Net has them."""

    def forward(m, x):
        parts, out = x.chunk(2, 1), []
        for i, part in enumerate(parts):
            out.append(m.norms[i](m.convs[i](part.contiguous() + (out[-1] if out else 0))).relu())
        return torch.cat(out, 1)

    convs = nn.ModuleList([conv(2, 2), conv(2, 2)])
    return Net(forward, convs=convs, norms=nn.ModuleList([bn(2), bn(2)]))


def shared_pair():
    """One head at two levels: the pair is the same each time."""
    return Net(
        lambda m, x: m.bn(m.conv(x)).mean() + m.bn(m.conv(F.avg_pool2d(x, 2))),
        conv=conv(),
        bn=bn(),
    )


def dropout():
    return Net(
        lambda m, x: m.bn(F.dropout(m.drop(m.conv(x)), 0.5, m.training)),
        conv=conv(), drop=nn.Dropout2d(), bn=bn(),
    )  # fmt: skip


def returned(m, x):
    y = m.conv(x)
    return m.bn(y), y


def between(m, x):
    return m.bn(m.conv(x).relu())


def in_place(m, x):
    return m.bn(m.conv(x).relu_())


def seen_through_a_view(m, x):
    y = m.conv(x)
    z = y[:, :2]
    return m.bn(y) + z.mean()


def weight_read(m, x):
    return m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1).relu()


def pair(forward, **kwargs):
    return lambda: Net(forward, conv=conv(**kwargs), bn=bn())


def straight(m, x):
    return m.bn(m.conv(x))


def many(kind, norm, shape, **kwargs):
    """A convolution of another kind, with the norm for it and an input of ``shape``."""

    def make():
        layer = kind(shape[1], 6, **kwargs)
        return Net(lambda m, x: m.bn(m.conv(m.x)), conv=layer, bn=norm(6)).with_input(shape)

    return make


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + x


def hooked():
    model = pair(straight)()
    model.conv.register_forward_hook(lambda m, args, y: y * 2)
    return model


def parametrized():
    model = pair(straight)()
    nn.utils.parametrizations.spectral_norm(model.conv)
    return model


#: Module -> number of norms folded.
FOLDED = {
    'odd order': (odd, 2),
    'crossed order': (crossed, 2),
    'lists': (lists, 2),
    'pair used twice': (shared_pair, 1),
    'dropout between': (dropout, 1),
    'not affine': (lambda: Net(straight, conv=conv(), bn=bn(affine=False)), 1),
    'synchronised': (lambda: Net(straight, conv=conv(), bn=nn.SyncBatchNorm(4)), 1),
    'conv 1d': (many(nn.Conv1d, nn.BatchNorm1d, (2, 4, 7), kernel_size=3), 1),
    'conv 3d': (many(nn.Conv3d, nn.BatchNorm3d, (1, 4, 5, 6, 7), kernel_size=3, groups=2), 1),
    'linear': (many(QuantLinear, nn.BatchNorm1d, (5, 4)), 1),
    'transposed 1d': (many(nn.ConvTranspose1d, nn.BatchNorm1d, (2, 4, 7), kernel_size=3), 1),
    'transposed 3d': (
        many(nn.ConvTranspose3d, nn.BatchNorm3d, (1, 4, 3, 4, 5), kernel_size=2, groups=2), 1
    ),
    'transposed': (
        many(QuantConvTranspose2d, nn.BatchNorm2d, (1, 4, 5, 6), kernel_size=3, stride=2), 1
    ),
    'transposed, groups, float': (
        many(nn.ConvTranspose2d, nn.BatchNorm2d, (1, 4, 5, 6), kernel_size=3, groups=2), 1
    ),
}  # fmt: skip
#: Module -> what is said of the norm that stays.
KEPT = {
    'returned': (pair(returned), 'conv: its output is kept or returned'),
    'read twice': (pair(read_twice), 'conv: its output is read by aten.sigmoid'),
    'view': (pair(seen_through_a_view), 'conv: its output is read by aten'),
    'weight read': (pair(weight_read), 'conv: its weights are read by aten'),
    'relu between': (pair(between), 'not the output of a convolution'),
    'relu in place': (pair(in_place), 'conv: its output is read by aten.relu_'),
    'norm first': (lambda: Net(lambda m, x: m.conv(m.bn(x)), bn=bn(), conv=conv()), 'not the out'),
    'convolution with two norms': (
        lambda: Net(lambda m, x: m.bn(m.conv(x)) + m.other(m.conv(x * 2)),
                    conv=conv(), bn=bn(), other=bn()),
        'conv has several batch norms',
    ),
    'norm of two convolutions': (
        lambda: Net(lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x)),
                    conv=conv(), bn=bn(), other=conv()),
        'reads the outputs of several',
    ),
    'no statistics': (
        lambda: Net(straight, conv=conv(), bn=bn(track_running_stats=False)),
        r'keeps no running statistics \(track_running_stats=False\)',
    ),
    'rounded between': (
        lambda: Net(lambda m, x: m.bn(m.round(m.conv(x))), conv=conv(), round=Quantizer(), bn=bn()),
        'read by a Quantizer, too',
    ),
    'own norm': (lambda: Net(straight, conv=conv(), bn=OwnNorm(4)), 'OwnNorm has a forward'),
    'own weight': (
        lambda: Net(straight, conv=ConvWS2d(4, 4, 3), bn=bn()), 'ConvWS2d has a forward'
    ),
    'parametrized': (parametrized, 'conv: its weight is computed'),
    'hook': (hooked, 'conv: it has forward hooks'),
    'channels last': (many(nn.Linear, nn.BatchNorm1d, (5, 6, 6)), 'its output has 3 axes'),
}  # fmt: skip


def flat(result):
    return torch.cat([t.flatten() for t in (result if isinstance(result, tuple) else (result,))])


@pytest.mark.parametrize('kind', [*FOLDED, *KEPT])
@torch.no_grad()
def test_folded_or_kept_and_equal(kind):
    """By a forward, and by order where that is asked for: never another function."""
    make, wanted = {**FOLDED, **KEPT}[kind]
    torch.manual_seed(0)
    model = spread(make()).double()
    set_mode(model, 'float')
    x = X.double()
    expected = flat(model(x))
    by_order = fold_bn(copy.deepcopy(model))
    assert relative(expected, flat(by_order(x))) < 1e-12
    with without_bn(model, lambda m: m(x)):
        assert relative(expected, flat(model(x))) < 1e-12
    assert flat(model(x)).equal(expected)
    norms = len(norms_of(model))
    reasons, unsure = fold_known(model, lambda m: m(x))
    assert relative(expected, flat(model(x))) < 1e-12
    assert not unsure and len(reasons) == len(norms_of(model))
    if kind in FOLDED:
        assert (norms - len(norms_of(model)), reasons) == (wanted, {})
    else:
        assert len(norms_of(model)) == norms
        assert all(re.search(wanted, reason) for reason in reasons.values())


@pytest.mark.parametrize('make', [odd, crossed, lists])
@torch.no_grad()
def test_fake_quant_and_ranges_after_calibration(make):
    """The model calibrated with its norms equals the folded one, integers included."""
    model = spread(make())
    calibrate(model, [X])
    model.double()
    folded = fold_bn(copy.deepcopy(model), lambda m: m(X.double()))
    assert not norms_of(folded)
    assert relative(model(X.double()), folded(X.double())) < 1e-6  # ranges are float32


@torch.no_grad()
def test_ranges_are_those_of_the_tensors_that_are_there():
    """The input of the second convolution, found without any folding."""
    model = spread(crossed())
    calibrate(model, [X], method='max')
    with set_mode(model, 'float'):
        largest = model.bn1(model.conv1(X)).relu().abs().max()
    assert float(model.conv2._input_quantizer.amax) == pytest.approx(float(largest), rel=1e-5)


@torch.no_grad()
def test_transposed_with_groups_in_fake_quant():
    """Folded where all groups have one factor, which leaves the shared ranges exact; else kept."""
    for equal in (True, False):
        layer = QuantConvTranspose2d(4, 6, 2, groups=2)
        model = spread(nn.Sequential(layer, nn.BatchNorm2d(6)))
        if equal:
            model[1].weight[3:] = -model[1].weight[:3]
            model[1].running_var[3:] = model[1].running_var[:3]
        calibrate(model, [X])
        model.double()
        expected = model(X.double())
        reasons, _ = fold_known(model, lambda m: m(X.double()))
        assert relative(expected, model(X.double())) < 1e-6
        assert not reasons if equal else 'groups' in reasons['1']
        assert model[0]._weight_quantizer.amax.shape == (1, 3, 1, 1)


def test_only_a_forward_tells():
    with pytest.warns(UserWarning, match=r'2 batch norm.*bn1 first.*pass run='):
        model = fold_bn(spread(odd()))
    assert len(norms_of(model)) == 2


def test_a_norm_that_only_a_list_holds_is_never_applied_twice():
    model = pair(lambda m, x: m.held[0](m.conv(x)))()
    model.held = [model.bn]
    set_mode(spread(model), 'float')
    fold_bn(model, lambda m: m(X))
    with pytest.raises(QuantError, match=r'folded into its convolution.*nn\.ModuleList'):
        model(X)


def test_conv_module_in_another_order():
    """Activation before norm: registered as ever, but called otherwise."""
    model = ConvModule(
        4, 4, 3, conv_cfg=dict(type='QuantConv2d'), norm_cfg=dict(type='BN'),
        order=('conv', 'act', 'norm'),
    )  # fmt: skip
    randomise(model)
    set_mode(model, 'float')
    expected = model(X)
    assert torch.equal(fold_bn(model)(X), expected)


@pytest.mark.parametrize(
    'layer, norm, shape',
    [
        (lambda: nn.Conv2d(3, 4, 3), NaiveSyncBatchNorm2d, (2, 3, 6, 7)),
        (lambda: nn.Conv1d(3, 4, 3), NaiveSyncBatchNorm1d, (2, 3, 6)),
    ],
)
def test_the_synchronised_norm_of_mmdet3d_is_torchs_in_eval_mode(layer, norm, shape):
    """It takes float32 only."""
    model = nn.Sequential(layer(), norm(4))
    randomise(model)
    model.eval()
    x = torch.randn(shape)
    expected = model(x)
    kept, _ = fold_known(model, lambda m: m(x))
    assert not kept and not norms_of(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
