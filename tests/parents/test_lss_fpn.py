"""The image neck: what it fuses, at which sizes, through which seam."""

import pytest
import torch
import torch.nn.functional as F

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.parents import GeneralizedLSSFPN

CHANNELS = [4, 6, 8]
SIZES = [(8, 12), (4, 6), (2, 3)]


def neck(**kwargs):
    torch.manual_seed(0)
    cfg = {**dict(in_channels=CHANNELS, out_channels=5, num_outs=3), **kwargs}
    return GeneralizedLSSFPN(**cfg).eval()


def features():
    torch.manual_seed(1)
    return [torch.randn(2, c, *s) for c, s in strict_zip(CHANNELS, SIZES)]


def test_forward_is_upsample_concat_1x1_3x3():
    model, (a, b, c) = neck(), features()
    up = dict(mode='bilinear', align_corners=True)
    with torch.no_grad():
        fine, coarse = model((a, b, c))
        x = torch.cat([b, F.interpolate(c, size=SIZES[1], **up)], 1)
        x = model.fpn_convs[1](model.lateral_convs[1](x))
        torch.testing.assert_close(coarse, x)
        x = torch.cat([a, F.interpolate(x, size=SIZES[0], **up)], 1)
        torch.testing.assert_close(fine, model.fpn_convs[0](model.lateral_convs[0](x)))


def test_concat_is_called_once_per_level():
    class Spy(GeneralizedLSSFPN):
        def concat(self, level, tensors):
            calls.append((level, [tuple(t.shape[1:]) for t in tensors]))
            return super().concat(level, tensors)

    calls = []
    Spy(in_channels=CHANNELS, out_channels=5, num_outs=3)(features())
    assert calls == [(1, [(6, 4, 6), (8, 4, 6)]), (0, [(4, 8, 12), (5, 8, 12)])]


def test_levels_in_between():
    model = neck(start_level=1, end_level=2, num_outs=1)
    assert len(model.lateral_convs) == 1
    assert [o.shape for o in model(features())] == [(2, 5, 4, 6)]


def test_lateral_norm_is_optional():
    assert neck().lateral_convs[0].with_norm
    bare = neck(no_norm_on_lateral=True)
    assert not bare.lateral_convs[0].with_norm and bare.fpn_convs[0].with_norm


@pytest.mark.parametrize(
    'kwargs', [dict(end_level=3, num_outs=3), dict(start_level=2), dict(end_level=2, num_outs=3)]
)
def test_levels_are_checked(kwargs):
    with pytest.raises(ValueError, match='GeneralizedLSSFPN: levels'):
        neck(**kwargs)


def test_number_of_inputs_is_checked():
    with pytest.raises(ValueError, match='expects 3 levels, got 2'):
        neck()(features()[:2])
