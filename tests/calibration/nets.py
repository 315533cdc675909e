"""Small models and data for the tests of calibration."""

import torch
from torch import nn

from mmdet3d_quant.layers import QuantConcat, QuantConv2d


class Branched(nn.Module):
    """Two convolutions that read one tensor, joined by a concat, and a third behind it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = QuantConv2d(3, 4, 3, padding=1)
        self.b = QuantConv2d(3, 4, 1)
        self.join = QuantConcat()
        self.c = QuantConv2d(8, 2, 1)

    def quant_ties(self):
        return [['a._input_quantizer', 'b._input_quantizer']]

    def forward(self, x):
        return self.c(self.join([self.a(x).relu(), self.b(x)]))


def batches(count=8, scale=1.0):
    """Batches whose size differs from one to the next."""
    generator = torch.Generator().manual_seed(5)
    sizes = torch.rand(count, generator=generator) * 2 + 0.5
    return [torch.randn(2, 3, 8, 8, generator=generator) * scale * float(size) for size in sizes]
