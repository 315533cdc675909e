"""Image neck of BEVFusion: a top-down pyramid that concatenates instead of adding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from torch import Tensor, nn

_NORM = dict(type='BN2d')
_ACT = dict(type='ReLU')
_UPSAMPLE = dict(mode='bilinear', align_corners=True)


class GeneralizedLSSFPN(BaseModule):
    """Fuses backbone levels from the coarsest down: upsample, concatenate, 1x1, 3x3.

    Args:
        in_channels: Channels of every backbone level.
        out_channels: Channels of every output.
        num_outs: Number of outputs; only checked when ``end_level`` is given, since public
            configs give 3 where two levels are fused.
        start_level: Index of the finest level used.
        end_level: Index of the coarsest level used; -1 is the last one.
        no_norm_on_lateral: Leaves the norm out of the 1x1 convolutions.
        conv_cfg: Convolution type, as ``mmcv.cnn.ConvModule`` takes it.
        norm_cfg: Norm type.
        act_cfg: Activation type.
        upsample_cfg: Arguments for ``torch.nn.functional.interpolate``, without a size.

    Raises:
        ValueError: If the levels asked for do not exist or do not match ``num_outs``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int = 0,
        end_level: int = -1,
        no_norm_on_lateral: bool = False,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = _NORM,
        act_cfg: dict | None = _ACT,
        upsample_cfg: dict = _UPSAMPLE,
    ) -> None:
        super().__init__()
        last = len(in_channels) - 1
        end = last if end_level == -1 else end_level
        if not 0 <= start_level < end <= last:
            raise ValueError(
                f'GeneralizedLSSFPN: levels {start_level} to {end} cannot be fused; expected '
                f'0 <= start_level < end_level <= {last} for in_channels={list(in_channels)}'
            )
        if end_level != -1 and num_outs != end - start_level:
            raise ValueError(
                f'GeneralizedLSSFPN: levels {start_level} to {end} give {end - start_level} '
                f'outputs, but num_outs={num_outs}'
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_outs = num_outs
        self.start_level = start_level
        self.end_level = end_level
        self.upsample_cfg = dict(upsample_cfg)

        shared = dict(conv_cfg=conv_cfg, act_cfg=act_cfg, inplace=False)
        lateral_norm = None if no_norm_on_lateral else norm_cfg
        self.lateral_convs = nn.ModuleList()
        self.fpn_convs = nn.ModuleList()
        for level in range(start_level, end):
            above = in_channels[end] if level + 1 == end else out_channels
            self.lateral_convs.append(
                ConvModule(
                    in_channels[level] + above, out_channels, 1, norm_cfg=lateral_norm, **shared
                )
            )
            self.fpn_convs.append(
                ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=norm_cfg, **shared)
            )

    def concat(self, level: int, tensors: list[Tensor]) -> Tensor:
        """Joins a level with the upsampled one above it; subclasses replace it.

        Args:
            level: Index into ``lateral_convs`` of the convolution that takes the result.
            tensors: The level and the upsampled one, (B, C_i, H, W).

        Returns:
            (B, sum of C_i, H, W).
        """
        return torch.cat(tensors, dim=1)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Fuses the levels.

        Args:
            inputs: One (B, in_channels[i], H_i, W_i) per backbone level, finest first.

        Returns:
            One (B, out_channels, H_i, W_i) per fused level, finest first.

        Raises:
            ValueError: If the number of inputs is not the number of ``in_channels``.
        """
        if len(inputs) != len(self.in_channels):
            raise ValueError(
                f'GeneralizedLSSFPN expects {len(self.in_channels)} levels, got {len(inputs)}'
            )
        outs: list[Tensor] = []
        x = inputs[self.start_level + len(self.lateral_convs)]
        for level in reversed(range(len(self.lateral_convs))):
            finer = inputs[self.start_level + level]
            size = [int(s) for s in finer.shape[2:]]  # plain ints keep an export static
            x = F.interpolate(x, size=size, **self.upsample_cfg)
            x = self.lateral_convs[level](self.concat(level, [finer, x]))
            x = self.fpn_convs[level](x)
            outs.append(x)
        return tuple(reversed(outs))
