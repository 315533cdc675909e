"""Float stand-ins of PETR's backbone and neck, which mmdet3d's wheel does not have.

VoVNet with one-shot aggregation and effective squeeze-and-excitation (Lee and Park, CenterMask,
2020), and a pyramid that convolves its finest level only. Widths and depths are PETR's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet3d.registry import MODELS
from torch import Tensor, nn

#: Channels of the convolutions and of the result of each stage of VoVNet-99, and its blocks.
WIDTHS = ((128, 256, 1), (160, 512, 3), (192, 768, 9), (224, 1024, 3))


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> ConvModule:
    """A convolution with batch norm and ReLU, padded to the size of its input."""
    norm = dict(type='BN')
    return ConvModule(inputs, outputs, kernel, stride, kernel // 2, bias=False, norm_cfg=norm)


class Gate(nn.Module):
    """Scales channels by a hard sigmoid of their averages."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.relu6(self.fc(F.adaptive_avg_pool2d(x, 1)) + 3) / 6


class Aggregation(nn.Module):
    """A chain of convolutions whose results are all joined at its end, once."""

    def __init__(self, inputs: int, inner: int, outputs: int, identity: bool, depth: int) -> None:
        super().__init__()
        self.identity = identity
        self.chain = nn.ModuleList(conv(inner if i else inputs, inner) for i in range(depth))
        self.join = conv(inputs + depth * inner, outputs, 1)
        self.gate = Gate(outputs)

    def forward(self, x: Tensor) -> Tensor:
        joined = [x]
        for layer in self.chain:
            joined.append(layer(joined[-1]))
        out = self.gate(self.join(torch.cat(joined, dim=1)))
        return out + x if self.identity else out


@MODELS.register_module()
class StandInVoVNet(nn.Module):
    """VoVNet.

    Args:
        widths: By stage channels inside and behind its blocks, and the number of blocks.
        stem: Channels of the three convolutions before them.
        depth: Convolutions of a block.
        out_indices: Stages whose maps are returned.
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]] = WIDTHS,
        stem: Sequence[int] = (64, 64, 128),
        depth: int = 5,
        out_indices: Sequence[int] = (2, 3),
    ) -> None:
        super().__init__()
        first, second, channels = stem
        parts = (conv(3, first, 3, 2), conv(first, second), conv(second, channels, 3, 2))
        self.stem = nn.Sequential(*parts)
        self.stages = nn.ModuleList()
        self.out_indices = tuple(out_indices)
        for i, (inner, outer, blocks) in enumerate(widths):
            stage = nn.Sequential(*[nn.MaxPool2d(3, 2, ceil_mode=True)] * bool(i))
            for block in range(blocks):
                stage.append(Aggregation(channels, inner, outer, block > 0, depth))
                channels = outer
            self.stages.append(stage)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return [maps[i] for i in self.out_indices]


@MODELS.register_module()
class StandInCPFPN(nn.Module):
    """A top-down pyramid with a convolution at its finest level only.

    Args:
        in_channels: Of the maps, finest first.
        out_channels: Of every level.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.in_channels = list(in_channels)
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        self.fpn_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        maps = [layer(x) for layer, x in zip(self.lateral_convs, inputs)]
        for i in range(len(maps) - 1, 0, -1):
            larger = F.interpolate(maps[i], size=maps[i - 1].shape[-2:], mode='nearest')
            maps[i - 1] = maps[i - 1] + larger
        return [self.fpn_conv(maps[0]), *maps[1:]]
