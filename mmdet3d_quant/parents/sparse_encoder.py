"""Sparse LiDAR encoders: mmdet3d's, and BEVFusion's with the axes in the order x, y, z."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from mmdet3d.models.layers import SparseBasicBlock, make_sparse_convmodule
from mmdet3d.models.layers.spconv import IS_SPCONV2_AVAILABLE
from mmdet3d.models.middle_encoders import SparseEncoder
from torch import Tensor

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.parents.sparse_layout import accept_any_layout

if IS_SPCONV2_AVAILABLE:
    from spconv.pytorch import SparseConv3d, SparseConvTensor

    from mmdet3d_quant.parents.sparse_conv import PortableSparseConv3d, PortableSubMConv3d

    _CONVS = {'SubMConv3d': PortableSubMConv3d, 'SparseConv3d': PortableSparseConv3d}
else:
    from mmcv.ops import SparseConv3d, SparseConvTensor, SubMConv3d

    _CONVS = {'SubMConv3d': SubMConv3d, 'SparseConv3d': SparseConv3d}

_NORM = dict(type='BN1d', eps=1e-3, momentum=0.01)
_CHANNELS = ((16,), (32, 32, 32), (64, 64, 64), (64, 64, 64))
_PADDINGS = ((1,), (1, 1, 1), (1, 1, 1), ((0, 1, 1), 1, 1))


class PortableSparseEncoder(SparseEncoder):
    """mmdet3d's ``SparseEncoder`` that also runs and trains on a CPU, and on empty clouds.

    Takes its arguments, keeps its state-dict keys and loads weights of either layout.

    Attributes:
        convs: Class to build for each type of convolution that mmdet3d names.
        block: Type of the residual blocks; takes the arguments of ``SparseBasicBlock``.
        height_axis: Axis of the grid that points up. The last convolution squeezes it.
        rectified: Whether the map is never negative: it comes out of a ReLU.
    """

    rectified: ClassVar[bool] = True

    convs: ClassVar[Mapping[str, type]] = _CONVS
    block: ClassVar[type] = SparseBasicBlock
    height_axis: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        sparse_shape: Sequence[int],
        order: tuple[str, str, str] = ('conv', 'norm', 'act'),
        norm_cfg: dict = _NORM,
        base_channels: int = 16,
        output_channels: int = 128,
        encoder_channels: Sequence = _CHANNELS,
        encoder_paddings: Sequence = _PADDINGS,
        block_type: str = 'conv_module',
        return_middle_feats: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            sparse_shape,
            order=order,
            norm_cfg=norm_cfg,
            base_channels=base_channels,
            output_channels=output_channels,
            encoder_channels=encoder_channels,
            encoder_paddings=encoder_paddings,
            block_type=block_type,
            return_middle_feats=return_middle_feats,
        )
        self.conv_input = make_sparse_convmodule(
            in_channels,
            base_channels,
            3,
            norm_cfg=norm_cfg,
            padding=1,
            indice_key='subm1',
            conv_type=self.convs['SubMConv3d'],
            order=('conv',) if order[0] != 'conv' else ('conv', 'norm', 'act'),
        )
        kernel, stride = [1, 1, 1], [1, 1, 1]
        kernel[self.height_axis], stride[self.height_axis] = 3, 2
        self.conv_out = make_sparse_convmodule(
            encoder_channels[-1][-1],
            output_channels,
            kernel_size=tuple(kernel),
            stride=tuple(stride),
            padding=0,
            norm_cfg=norm_cfg,
            indice_key='spconv_down2',
            conv_type=self.convs['SparseConv3d'],
        )
        accept_any_layout(self)

    def make_encoder_layers(
        self,
        make_block: Any,
        norm_cfg: dict,
        in_channels: int,
        block_type: str = 'conv_module',
        conv_cfg: dict | None = None,
    ) -> int:
        """Builds the stages of the parent out of ``convs`` and ``block``."""

        def make(*args: Any, conv_type: str, **kwargs: Any) -> Any:
            return make_block(*args, conv_type=self.convs[conv_type], **kwargs)

        conv_cfg = dict(conv_cfg or {}, type=self.convs['SubMConv3d'])
        channels = super().make_encoder_layers(make, norm_cfg, in_channels, block_type, conv_cfg)
        if self.block is not SparseBasicBlock:  # which the parent names in the middle of its loop
            for stage in self.encoder_layers:
                for name, block in list(stage.named_children()):
                    if isinstance(block, SparseBasicBlock):
                        width = block.conv1.in_channels
                        own = self.block(width, width, norm_cfg=norm_cfg, conv_cfg=conv_cfg)
                        stage.add_module(name, own)
        return channels

    def forward(
        self, voxel_features: Tensor, coors: Tensor, batch_size: int
    ) -> Tensor | tuple[Tensor, list]:
        """Encodes voxels to a dense bird's-eye-view map.

        Args:
            voxel_features: (N, in_channels), float; N may be 0.
            coors: (N, 4), integer, columns (sample, z, y, x) in voxels.
            batch_size: Number of samples.

        Returns:
            (batch_size, output_channels * z, y, x), zero where nothing is active; channel
            ``c * z + k`` is channel c at height k. With ``return_middle_feats`` a tuple of it
            and the sparse tensor of each stage (none for an empty cloud).
        """
        if len(voxel_features) == 0:
            bev = self._empty(voxel_features, int(batch_size)).flatten(1, 2)
            return (bev, []) if self.return_middle_feats else bev
        return super().forward(voxel_features, coors, int(batch_size))

    def _empty(self, like: Tensor, batch_size: int) -> Tensor:
        """Creates the map of a cloud without voxels: zeros (B, output_channels, *grid)."""
        shape = list(self.sparse_shape)
        for conv in self.modules():
            if isinstance(conv, SparseConv3d):
                shape = [
                    (n + 2 * p - d * (k - 1) - 1) // s + 1
                    for n, p, d, k, s in strict_zip(
                        shape,
                        conv.padding,
                        conv.dilation,
                        conv.kernel_size,
                        conv.stride,
                    )
                ]
        return torch.zeros((batch_size, self.output_channels, *shape), device=like.device)


class BEVFusionSparseEncoder(PortableSparseEncoder):
    """``SparseEncoder`` whose sparse shape is (x, y, z) and whose height axis comes last.

    Args:
        in_channels: Channels of a voxel.
        sparse_shape: Number of voxels along x, y and z.
        order: Order of convolution, norm and activation.
        norm_cfg: Norm type.
        base_channels: Channels after the first convolution.
        output_channels: Channels after the last convolution.
        encoder_channels: Channels of every block of every stage.
        encoder_paddings: Paddings of every block of every stage.
        block_type: ``'conv_module'`` or ``'basicblock'``.
        return_middle_feats: Whether to return the sparse output of every stage, too.
    """

    height_axis = 2

    def forward(
        self, voxel_features: Tensor, coors: Tensor, batch_size: int
    ) -> Tensor | tuple[Tensor, list]:
        """Encodes voxels to a dense bird's-eye-view map.

        Args:
            voxel_features: (N, in_channels), float; N may be 0.
            coors: (N, 4), integer, columns (sample, x, y, z) in voxels.
            batch_size: Number of samples.

        Returns:
            (batch_size, output_channels * z, x, y), zero where nothing is active; channel
            ``c * z + k`` is channel c at height k. With ``return_middle_feats`` a tuple of it
            and the sparse tensor of each stage (none for an empty cloud).
        """
        middle: list[Any] = []
        if len(voxel_features) == 0:
            dense = self._empty(voxel_features, int(batch_size))
        else:
            x = SparseConvTensor(
                voxel_features, coors.int(), list(self.sparse_shape), int(batch_size)
            )
            x = self.conv_input(x)
            for stage in self.encoder_layers:
                x = stage(x)
                middle.append(x)
            dense = self.conv_out(x).dense()
        bev = dense.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous()
        return (bev, middle) if self.return_middle_feats else bev
