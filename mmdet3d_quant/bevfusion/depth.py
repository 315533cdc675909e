"""View transform whose depths LiDAR points supervise in training; inference needs no points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdet3d_quant.parents import DepthLSSTransform, LSSTransform


class DepthSupervisedLSSTransform(LSSTransform):
    """``LSSTransform`` whose depths are trained on LiDAR points, as BEVDepth (2206.10092) does.

    From boxes alone a model takes long to find out how far things are. Weights and inference are
    those of ``LSSTransform``; only training needs ``points``.

    Args:
        *args: Arguments of ``LSSTransform``.
        loss_weight: Weight of ``loss_depth``.
        **kwargs: Arguments of ``LSSTransform``.
    """

    def __init__(self, *args: Any, loss_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_weight = loss_weight
        self._losses: dict[str, Tensor] = {}

    depth_map = DepthLSSTransform.depth_map

    def forward(
        self,
        img: Tensor,
        points: Sequence[Tensor] | None,
        lidar2image: Tensor,
        camera_intrinsics: Tensor,
        camera2lidar: Tensor,
        img_aug_matrix: Tensor,
        lidar_aug_matrix: Tensor,
        metas: Any = None,
    ) -> Tensor:
        """Computes the map; in training it also keeps the depth loss for :meth:`pop_losses`.

        Raises:
            ValueError: If in training there is not one point cloud per sample.
        """
        context, depth = self.lift(img)
        if self.training:
            if points is None or len(points) != len(img):
                raise ValueError(
                    f'{type(self).__name__} needs one LiDAR point cloud per sample to train: '
                    f'expected {len(img)}, got {0 if points is None else len(points)}; add '
                    "'points' to the keys of Pack3DDetInputs"
                )
            matrices = (lidar2image, img_aug_matrix, lidar_aug_matrix)
            bins = self.depth_bins(self.depth_map(points, *matrices, img.shape[1]))
            loss = F.nll_loss(depth.clamp(min=1e-6).log(), bins, ignore_index=-1, reduction='sum')
            count = (bins >= 0).sum().clamp(min=1)
            self._losses = dict(loss_depth=self.loss_weight * loss / count)
        return self._project(
            (context, depth), camera_intrinsics, camera2lidar, img_aug_matrix, lidar_aug_matrix
        )

    @torch.no_grad()
    def depth_bins(self, depth_map: Tensor) -> Tensor:
        """Finds the depth bin of the nearest point in each cell of the features.

        Args:
            depth_map: Metres, 0 where no point falls; (B, N, 1, H, W).

        Returns:
            (B*N, fH, fW), int64; -1 without a point or where it lies outside of the bins.
        """
        near = depth_map.flatten(0, 1)
        near = torch.where(near > 0, near, torch.inf)
        near = -F.adaptive_max_pool2d(-near, tuple(self.feature_size))[:, 0]
        first, _, step = self.dbound
        bins = ((near - first) / step).floor()
        return torch.where((bins >= 0) & (bins < self.D), bins, -1.0).long()

    def pop_losses(self) -> dict[str, Tensor]:
        """Returns ``loss_depth`` of the last forward and forgets it; empty outside of training."""
        losses, self._losses = self._losses, {}
        return losses
