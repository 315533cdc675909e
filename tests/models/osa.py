"""One-shot aggregation with a gate, as VoVNet has it: mmdet and mmdet3d have no such backbone."""

import torch
from mmdet3d.registry import MODELS
from torch import nn


def _conv(inputs, outputs, kernel=3):
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Block(nn.Module):
    """Convolutions in a row, a concat of all that they made, a gate by channel, an identity."""

    def __init__(self, inputs, inner, outputs):
        super().__init__()
        self.layers = nn.ModuleList([_conv(inputs, inner), _conv(inner, inner)])
        self.concat = _conv(inputs + 2 * inner, outputs, 1)
        self.fc = nn.Conv2d(outputs, outputs, 1)
        self.same = inputs == outputs

    def forward(self, x):
        found = [x]
        for layer in self.layers:
            found.append(layer(found[-1]))
        y = self.concat(torch.cat(found, 1))
        y = y * nn.functional.hardsigmoid(self.fc(y.mean((2, 3), keepdim=True)))
        return y + x if self.same else y


@MODELS.register_module()
class SmallOSA(nn.Module):
    """A stem and two stages; the second has a block with an identity."""

    def __init__(self):
        super().__init__()
        self.stem = _conv(3, 8)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.blocks = nn.ModuleList([Block(8, 6, 16), Block(16, 6, 16)])

    def forward(self, x):
        maps = []
        x = self.stem(x)
        for block in self.blocks:
            x = block(self.pool(x) if not maps else x)
            maps.append(x)
        return maps
