"""The fuser: what it computes, and the seam for its convolution."""

import torch
from torch import nn

from mmdet3d_quant.parents import ConvFuser


def test_concatenates_in_order_then_convolves():
    fuser = ConvFuser([2, 3], 4).eval()
    a, b = torch.randn(1, 2, 5, 5), torch.randn(1, 3, 5, 5)
    wanted = nn.functional.conv2d(torch.cat([a, b], 1), fuser[0].weight, padding=1)
    wanted = (wanted / (1 + fuser[1].eps) ** 0.5).relu()
    torch.testing.assert_close(fuser([a, b]), wanted)
    assert wanted.abs().sum() > 0 and list(dict(fuser.named_children())) == ['0', '1', '2']


def test_convolution_comes_through_the_seam():
    class Conv(nn.Conv2d):
        pass

    class Child(ConvFuser):
        def _conv(self, *args, **kwargs):
            return Conv(*args, **kwargs)

    fuser = Child([2, 3], 4)
    assert type(fuser[0]) is Conv and fuser[0].bias is None
    assert fuser[0].weight.shape == (4, 5, 3, 3)
