"""View transform that LiDAR points teach depth and class; inference needs no points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.parents import DepthLSSTransform, LSSTransform
from mmdet3d_quant.parents.view_transform import project_points


class DepthSupervisedLSSTransform(LSSTransform):
    """``LSSTransform`` whose depths are trained on LiDAR points, as BEVDepth (2206.10092) does.

    From boxes alone a model takes long to find out how far things are. Weights and inference are
    those of ``LSSTransform``; only training needs ``points``.

    Args:
        *args: Arguments of ``LSSTransform``.
        loss_weight: Weight of ``loss_depth``.
        class_weight: Weight of ``loss_class``; above 0, the last column of the points is a label
            from 0 (none) to ``num_labels - 1``, as :class:`LabelPoints` writes it, and the first
            channels of the context are taught to tell it.
        num_labels: Labels of the points.
        **kwargs: Arguments of ``LSSTransform``.
    """

    def __init__(
        self,
        *args: Any,
        loss_weight: float = 1.0,
        class_weight: float = 0.0,
        num_labels: int = 11,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if class_weight and num_labels > self.C:
            raise ValueError(f'num_labels={num_labels} needs as many out_channels, got {self.C}')
        self.loss_weight, self.class_weight = loss_weight, class_weight
        self.num_labels = num_labels
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
            if self.class_weight:
                labels = self.labels(points, *matrices)
                told = context[:, : self.num_labels].float()
                count = labels[labels >= 0].bincount(minlength=self.num_labels)
                rare = (count + 1.0).rsqrt()  # or the ground would drown out bicycles
                loss = F.cross_entropy(told, labels, rare, ignore_index=-1)
                self._losses['loss_class'] = self.class_weight * loss
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

    @torch.no_grad()
    def labels(
        self,
        points: Sequence[Tensor],
        lidar2image: Tensor,
        img_aug_matrix: Tensor,
        lidar_aug_matrix: Tensor,
    ) -> Tensor:
        """Finds the label of the nearest point in each cell of the features.

        Args:
            points: One (P, >=4) tensor per sample, the label in the last column.
            lidar2image: (B, N, 4, 4).
            img_aug_matrix: (B, N, 4, 4).
            lidar_aug_matrix: (B, 4, 4).

        Returns:
            (B*N, fH, fW), int64; -1 without a point.
        """
        undo = torch.inverse(lidar_aug_matrix[:, :3, :3])
        found = []
        for cloud, *matrices in strict_zip(
            points, lidar2image, img_aug_matrix, lidar_aug_matrix, undo
        ):
            depth, seen = project_points(self.image_size, cloud, *matrices)
            if len(cloud) == 0:
                found.append(seen.new_full((len(seen), *self.feature_size), -1))
                continue
            near = depth.masked_fill(seen < 0, torch.inf).view(len(seen), 1, *self.image_size)
            _, pixel = F.adaptive_max_pool2d(-near, tuple(self.feature_size), return_indices=True)
            point = seen.gather(1, pixel.flatten(1))
            label = cloud[:, -1].long()[point.clamp(min=0)].masked_fill(point < 0, -1)
            found.append(label.view(len(seen), *self.feature_size))
        return torch.cat(found)

    def pop_losses(self) -> dict[str, Tensor]:
        """Returns ``loss_depth`` of the last forward and forgets it; empty outside of training."""
        losses, self._losses = self._losses, {}
        return losses
