"""Nets with batch norms, for tests of folding."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet3d_quant.layers import QuantConv2d


def randomise(model, seed=0):
    """Weights and statistics that make every term of the fold matter, negative gammas too."""
    torch.manual_seed(seed)
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            nn.init.uniform_(m.weight, -1.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.2, 3)
    model.eval()
    return model


def relative(a, b):
    return float((a - b).norm() / a.norm())


class Net(nn.Module):
    """A module of named children and a function of it and its input."""

    def __init__(self, forward, **children):
        super().__init__()
        self.run = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.run(self, x)

    def with_input(self, shape):
        """Itself, with an input of another shape as ``x``."""
        torch.manual_seed(1)
        self.register_buffer('x', torch.randn(shape))
        return self


def conv(cin=4, cout=4, **kwargs):
    return QuantConv2d(cin, cout, 3, padding=1, **kwargs)


def bn(channels=4, **kwargs):
    return nn.BatchNorm2d(channels, **kwargs)


def odd():
    """Registered conv1, conv2, bn1, bn2: by order, the second norm's convolution is the first."""
    parts = dict(conv1=conv(), conv2=conv(), bn1=bn(), bn2=bn())
    return Net(lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x)).relu())), **parts)


def crossed():
    """conv1, bn2, conv2, bn1 as registered: each pair by order is a wrong one."""
    parts = dict(conv1=conv(), bn2=bn(), conv2=conv(), bn1=bn())
    return Net(lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x)).relu())), **parts)


def read_twice(m, x):
    y = m.conv(x)
    return m.bn(y) + y.sigmoid()


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def spread(model):
    """As ``randomise``, for norms without weight or statistics, too."""
    for m in norms_of(model):
        if m.running_mean is not None:
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.2, 3)
        if m.weight is not None:
            nn.init.uniform_(m.weight, -1.5, 1.5)
            nn.init.normal_(m.bias)
    return model.eval()
