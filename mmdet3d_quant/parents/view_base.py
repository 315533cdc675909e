"""Base of both view transforms: the geometry, the splat and the layers behind it."""

from __future__ import annotations

from typing import Any, Sequence

import torch
from torch import Tensor, nn

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.parents.bev_pool import bev_pool
from mmdet3d_quant.parents.derived import take_derived_from_config

Bound = Sequence[float]


class ViewTransform(nn.Module):
    """Base of the view transforms; a subclass adds ``_build``, ``lift`` and ``forward``.

    Args:
        in_channels: Channels of the image features.
        out_channels: Channels of a bird's-eye-view cell.
        image_size: Height and width of the network's images, in pixels.
        feature_size: Height and width of the image features.
        xbound: First edge, last edge and cell size along x of the LiDAR frame, in metres.
        ybound: The same along y.
        zbound: The same along z.
        dbound: First, last (excluded) and step of the depth bins, in metres.
        downsample: 1, or 2 to halve the resolution of the map by convolutions.

    Attributes:
        dx: Cell size along x, y, z; float32 (3,).
        bx: Centre of the first cell; float32 (3,).
        nx: Number of cells; int64 (3,).
        frustum: Pixel column, pixel row and depth of each bin; float32 (D, fH, fW, 3).
        rectified: Whether the map is never negative: with ``downsample=2`` it comes out of a ReLU.

    Raises:
        ValueError: If ``downsample`` is neither 1 nor 2, or 2 with more than one cell along z.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: Sequence[int],
        feature_size: Sequence[int],
        xbound: Bound,
        ybound: Bound,
        zbound: Bound,
        dbound: Bound,
        downsample: int = 1,
    ) -> None:
        super().__init__()
        if downsample not in (1, 2):
            raise ValueError(f'{type(self).__name__}: downsample must be 1 or 2, got {downsample}')
        self.in_channels = in_channels
        self.image_size = image_size
        self.feature_size = feature_size
        self.dbound = dbound

        def fixed(values: Any) -> nn.Parameter:
            return nn.Parameter(torch.as_tensor(values), requires_grad=False)

        bounds = (xbound, ybound, zbound)
        self.dx = fixed([float(step) for _, _, step in bounds])
        self.bx = fixed([low + step / 2 for low, _, step in bounds])
        self.nx = fixed([int((high - low) / step) for low, high, step in bounds])
        self.frustum = fixed(self._frustum())
        self.C = out_channels
        self.D = self.frustum.shape[0]
        if downsample == 2 and self.nx[2] != 1:
            raise ValueError(
                f'{type(self).__name__}: downsample=2 works on maps of one height; zbound '
                f'{list(zbound)} gives {int(self.nx[2])}'
            )
        take_derived_from_config(self)
        self._build()
        self.rectified = downsample == 2
        self.downsample = self._downsample(out_channels) if downsample == 2 else nn.Identity()

    def _frustum(self) -> Tensor:
        (height, width), (rows, cols) = self.image_size, self.feature_size
        x = torch.linspace(0, width - 1, cols).view(1, 1, -1)
        y = torch.linspace(0, height - 1, rows).view(1, -1, 1)
        d = torch.arange(*self.dbound, dtype=torch.float).view(-1, 1, 1)
        return torch.stack(torch.broadcast_tensors(x, y, d), dim=-1)

    def _build(self) -> None:
        """Makes the layers in front of the splat."""
        raise NotImplementedError

    def _conv(self, part: str, *args: Any, **kwargs: Any) -> nn.Module:
        """Makes a convolution of ``dtransform``, ``depthnet`` or ``downsample``.

        Args:
            part: Which of the three; subclasses may treat them differently.
            *args: Arguments of ``nn.Conv2d``.
            **kwargs: Arguments of ``nn.Conv2d``.
        """
        return nn.Conv2d(*args, **kwargs)

    def _downsample(self, channels: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for stride in (1, 2, 1):
            conv = self._conv(
                'downsample', channels, channels, 3, stride=stride, padding=1, bias=False
            )
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def get_geometry(
        self,
        camera2lidar_rots: Tensor,
        camera2lidar_trans: Tensor,
        intrins: Tensor,
        post_rots: Tensor,
        post_trans: Tensor,
        extra_rots: Tensor | None = None,
        extra_trans: Tensor | None = None,
    ) -> Tensor:
        """Computes the positions of all depth bins in the (augmented) LiDAR frame.

        Args:
            camera2lidar_rots: (B, N, 3, 3).
            camera2lidar_trans: (B, N, 3), metres.
            intrins: Camera matrices, (B, N, 3, 3).
            post_rots: Image augmentation, (B, N, 3, 3).
            post_trans: Image augmentation, (B, N, 3), pixels.
            extra_rots: LiDAR augmentation, (B, 3, 3).
            extra_trans: LiDAR augmentation, (B, 3), metres.

        Returns:
            (B, N, D, fH, fW, 3), x, y, z in metres.
        """

        # Products are summed from the first on and nothing is merged: cells are found by
        # rounding, so a last bit here can move a whole bin to the neighbouring cell.
        def rotate(matrix: Tensor, xyz: Sequence[Tensor]) -> list[Tensor]:
            rows = matrix[..., None, None, None].unbind(-5)
            x, y, z = xyz
            return [a * x + b * y + c * z for a, b, c in (r.unbind(-4) for r in rows)]

        def spread(vector: Tensor) -> list[Tensor]:
            return list(vector[..., None, None, None].unbind(-4))

        u, v, d = (f - t for f, t in strict_zip(self.frustum.unbind(-1), spread(post_trans)))
        u, v, d = rotate(torch.inverse(post_rots), (u, v, d))
        xyz = rotate(camera2lidar_rots @ torch.inverse(intrins), (u * d, v * d, d))
        xyz = [p + t for p, t in strict_zip(xyz, spread(camera2lidar_trans))]
        if extra_rots is not None:
            xyz = rotate(extra_rots[:, None], xyz)
        if extra_trans is not None:
            xyz = [p + t for p, t in strict_zip(xyz, spread(extra_trans[:, None]))]
        return torch.stack(xyz, dim=-1)

    def splat(self, geom: Tensor, context: Tensor, depth: Tensor) -> Tensor:
        """Sums context, weighted by depth, over the cells of the map.

        Args:
            geom: Positions from :meth:`get_geometry`, (B, N, D, fH, fW, 3), metres.
            context: (B*N, C, fH, fW).
            depth: Distribution over depth bins, (B*N, D, fH, fW).

        Returns:
            (B, C*nz, nx, ny), float32; channel ``k * C + c`` is channel c at height k.
        """
        nx, ny, nz = self.nx.tolist()
        batch = len(geom)
        bev = bev_pool(context, depth, self.cells(geom), batch * nz * nx * ny)
        bev = bev.view(batch, nz, nx, ny, self.C)
        return bev.permute(0, 1, 4, 2, 3).reshape(batch, nz * self.C, nx, ny)

    def cells(self, geom: Tensor) -> Tensor:
        """Numbers the cell of each depth bin, (B*N, D, fH, fW), int64; -1 outside of the map.

        Args:
            geom: Positions from :meth:`get_geometry`, (B, N, D, fH, fW, 3), metres.
        """
        nx, ny, nz = self.nx.tolist()
        ix, iy, iz = cells_of(geom, self.bx, self.dx).unbind(-1)
        inside = (ix >= 0) & (ix < nx) & (iy >= 0) & (iy < ny) & (iz >= 0) & (iz < nz)
        sample = torch.arange(len(geom), device=geom.device).view(-1, 1, 1, 1, 1)
        cells = (((sample * nz + iz) * nx + ix) * ny + iy).masked_fill(~inside, -1)
        return cells.flatten(0, 1)

    def _project(
        self,
        lifted: tuple[Tensor, Tensor],
        camera_intrinsics: Tensor,
        camera2lidar: Tensor,
        img_aug_matrix: Tensor,
        lidar_aug_matrix: Tensor,
    ) -> Tensor:
        """Splats lifted features with (B, N, 4, 4) and (B, 4, 4) matrices; downsamples."""
        geom = self.get_geometry(
            camera2lidar[..., :3, :3],
            camera2lidar[..., :3, 3],
            camera_intrinsics[..., :3, :3],
            img_aug_matrix[..., :3, :3],
            img_aug_matrix[..., :3, 3],
            extra_rots=lidar_aug_matrix[..., :3, :3],
            extra_trans=lidar_aug_matrix[..., :3, 3],
        )
        return self.downsample(self.splat(geom, *lifted))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Splits the output of ``depthnet``, (B*N, D+C, fH, fW), into context and depth."""
        return x[:, self.D : self.D + self.C], x[:, : self.D].softmax(dim=1)


def cells_of(geom: Tensor, bx: Tensor, dx: Tensor) -> Tensor:
    """Computes the cells of positions.

    Args:
        geom: (..., 3), x, y, z in metres.
        bx: Centre of the first cell, (3,).
        dx: Size of a cell, (3,).

    Returns:
        (..., 3), int64, along x, y, z; outside of the map too small or too large.
    """
    # Truncation, not floor: bins up to one cell before the first edge count as inside.
    return ((geom - (bx - dx / 2)) / dx).long()
