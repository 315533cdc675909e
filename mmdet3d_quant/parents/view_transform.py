"""Lift, splat: camera features to bird's-eye view through a distribution over depths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.parents.view_base import ViewTransform


class LSSTransform(ViewTransform):
    """Estimates depth from the image alone; see :class:`ViewTransform` for the arguments."""

    def _build(self) -> None:
        self.depthnet = self._conv('depthnet', self.in_channels, self.D + self.C, 1)

    def lift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Context and depth distribution of every pixel.

        Args:
            x: Image features, (B, N, in_channels, fH, fW).

        Returns:
            Context (B*N, C, fH, fW) and depth (B*N, D, fH, fW), which sums to 1 over D.
        """
        return self._split(self.depthnet(x.flatten(0, 1)))

    def forward(
        self,
        img: Tensor,
        points: Any,
        lidar2image: Any,
        camera_intrinsics: Tensor,
        camera2lidar: Tensor,
        img_aug_matrix: Tensor,
        lidar_aug_matrix: Tensor,
        metas: Any = None,
    ) -> Tensor:
        """Computes the map of image features.

        Args:
            img: Image features, (B, N, in_channels, fH, fW).
            points: Not used.
            lidar2image: Not used.
            camera_intrinsics: (B, N, 4, 4).
            camera2lidar: (B, N, 4, 4).
            img_aug_matrix: (B, N, 4, 4).
            lidar_aug_matrix: (B, 4, 4).
            metas: Not used.

        Returns:
            (B, C*nz, nx, ny), or half of nx and ny with ``downsample=2``.
        """
        return self._project(
            self.lift(img), camera_intrinsics, camera2lidar, img_aug_matrix, lidar_aug_matrix
        )


class DepthLSSTransform(ViewTransform):
    """Estimates depth from the image and the LiDAR points that fall into it.

    See :class:`ViewTransform` for the arguments.
    """

    def _build(self) -> None:
        depth_layers: list[nn.Module] = []
        for args, kwargs in (
            ((1, 8, 1), {}),
            ((8, 32, 5), dict(stride=4, padding=2)),
            ((32, 64, 5), dict(stride=2, padding=2)),
        ):
            conv = self._conv('dtransform', *args, **kwargs)
            depth_layers += [conv, nn.BatchNorm2d(args[1]), nn.ReLU(inplace=True)]
        self.dtransform = nn.Sequential(*depth_layers)

        width = self.in_channels
        layers: list[nn.Module] = []
        for channels in (width + 64, width):
            conv = self._conv('depthnet', channels, width, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers.append(self._conv('depthnet', width, self.D + self.C, 1))
        self.depthnet = nn.Sequential(*layers)

    def depth_map(
        self: ViewTransform,  # so that others can borrow it
        points: Sequence[Tensor],
        lidar2image: Tensor,
        img_aug_matrix: Tensor,
        lidar_aug_matrix: Tensor,
        num_cams: int,
    ) -> Tensor:
        """Projects the LiDAR points to a depth map of every image.

        Where several points hit one pixel, the last one in order wins. Points behind a camera
        count as 1e-5 m in front of it.

        Args:
            points: One (P, >=3) float tensor per sample, x, y, z in metres first; unchanged.
            lidar2image: (B, N, 4, 4).
            img_aug_matrix: (B, N, 4, 4).
            lidar_aug_matrix: (B, 4, 4); undone before projecting.
            num_cams: N.

        Returns:
            (B, N, 1, H, W), float32, metres; 0 where no point falls.
        """
        undo = torch.inverse(lidar_aug_matrix[:, :3, :3])  # at once: a GPU is waited for
        matrices = (lidar2image, img_aug_matrix, lidar_aug_matrix, undo)
        size = self.image_size
        maps = [project_points(size, p, *m)[0] for p, *m in strict_zip(points, *matrices)]
        return torch.stack(maps).view(len(maps), num_cams, 1, *size)

    def lift(self, x: Tensor, depth_map: Tensor) -> tuple[Tensor, Tensor]:
        """Context and depth distribution of every pixel.

        Args:
            x: Image features, (B, N, in_channels, fH, fW).
            depth_map: From :meth:`depth_map`, (B, N, 1, H, W), metres.

        Returns:
            Context (B*N, C, fH, fW) and depth (B*N, D, fH, fW), which sums to 1 over D.
        """
        depth = self.dtransform(depth_map.flatten(0, 1))
        return self._split(self.depthnet(torch.cat([depth, x.flatten(0, 1)], dim=1)))

    def forward(
        self,
        img: Tensor,
        points: Sequence[Tensor],
        lidar2image: Tensor,
        camera_intrinsics: Tensor,
        camera2lidar: Tensor,
        img_aug_matrix: Tensor,
        lidar_aug_matrix: Tensor,
        metas: Any = None,
    ) -> Tensor:
        """Computes the map of image features and points.

        Args:
            img: Image features, (B, N, in_channels, fH, fW).
            points: One (P, >=3) tensor per sample, x, y, z in metres first.
            lidar2image: (B, N, 4, 4).
            camera_intrinsics: (B, N, 4, 4).
            camera2lidar: (B, N, 4, 4).
            img_aug_matrix: (B, N, 4, 4).
            lidar_aug_matrix: (B, 4, 4).
            metas: Not used.

        Returns:
            (B, C*nz, nx, ny), or half of nx and ny with ``downsample=2``.

        Raises:
            ValueError: If there is not one point cloud per sample.
        """
        if points is None or len(points) != len(img):
            count = 'none' if points is None else len(points)
            raise ValueError(
                'DepthLSSTransform needs one LiDAR point cloud per sample for its depth maps: '
                f'expected {len(img)}, got {count}; LSSTransform works without'
            )
        depth = self.depth_map(points, lidar2image, img_aug_matrix, lidar_aug_matrix, img.shape[1])
        lifted = self.lift(img, depth)
        return self._project(
            lifted, camera_intrinsics, camera2lidar, img_aug_matrix, lidar_aug_matrix
        )


def project_points(
    image_size: Sequence[int],
    points: Tensor,
    lidar2image: Tensor,
    img_aug: Tensor,
    lidar_aug: Tensor,
    undo: Tensor,
) -> tuple[Tensor, Tensor]:
    """Projects one sample's points to its N images.

    Args:
        image_size: H, W.
        points: (P, >=3), x, y, z in metres first.
        lidar2image: (N, 4, 4).
        img_aug: (N, 4, 4).
        lidar_aug: (4, 4); undone before projecting.
        undo: Inverse of its rotation and scale, (3, 3).

    Returns:
        Depths of all pixels, (N, H*W), metres, 0 where no point falls, and the number of the point
        that each sees, (N, H*W), int64, -1 where there is none.
    """
    height, width = image_size
    xyz = (points[:, :3].float() - lidar_aug[:3, 3]).T
    depth, row, col, inside = to_pixels(image_size, undo @ xyz, lidar2image, img_aug)
    cam_id, point_id = inside.nonzero(as_tuple=True)
    target = (cam_id * height + row[inside].long()) * width + col[inside].long()
    # One winner per pixel, whatever the order in which a device writes.
    winner = point_id.new_full((len(inside) * height * width,), -1)
    winner.scatter_reduce_(0, target, point_id, 'amax')
    winner = winner.view(len(inside), -1)
    if len(points) == 0:
        return depth.new_zeros(winner.shape), winner
    return depth.gather(1, winner.clamp(min=0)).masked_fill(winner < 0, 0.0), winner


def to_pixels(
    image_size: Sequence[int], xyz: Tensor, lidar2image: Tensor, img_aug: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes where points of the LiDAR frame fall in N images.

    Args:
        image_size: H, W.
        xyz: (3, P), metres.
        lidar2image: (N, 4, 4).
        img_aug: (N, 4, 4).

    Returns:
        Depths, rows and columns, float, and whether the image has them, bool; each (N, P).
    """
    height, width = image_size
    cam = lidar2image[:, :3, :3] @ xyz + lidar2image[:, :3, 3:]
    depth = cam[:, 2].clamp(1e-5, 1e5)
    pixel = torch.cat([cam[:, :2] / depth[:, None], depth[:, None]], dim=1)
    pixel = img_aug[:, :3, :3] @ pixel + img_aug[:, :3, 3:]
    col, row = pixel[:, 0], pixel[:, 1]
    return depth, row, col, (row >= 0) & (row < height) & (col >= 0) & (col < width)
