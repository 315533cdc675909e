"""Fusion of camera and LiDAR features in bird's-eye view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ConvFuser(nn.Sequential):
    """Concatenation, then 3x3 convolution, batch norm and ReLU.

    Args:
        in_channels: Channels of each input, in the order the inputs are given.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        conv = self._conv(sum(in_channels), out_channels, 3, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))
        self.in_channels = in_channels
        self.out_channels = out_channels

    def _conv(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Makes the convolution, from arguments of ``nn.Conv2d``. Subclasses replace it.

        It runs before ``nn.Module.__init__``: an override must not assign modules to ``self``.
        """
        return nn.Conv2d(*args, **kwargs)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Fuses one feature map per sensor.

        Args:
            inputs: Tensors (B, in_channels[i], H, W).

        Returns:
            (B, out_channels, H, W).
        """
        return super().forward(torch.cat(tuple(inputs), dim=1))
