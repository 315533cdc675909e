"""The camera of a BEVFusion as Autoware's files have it: depth maps, features and BEV pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.export.autoware.modules import Body
from mmdet3d_quant.parents.view_base import cells_of
from mmdet3d_quant.parents.view_transform import to_pixels


class ImageBackbone(nn.Module):
    """Images as a camera has them to features.

    ``forward(imgs)``: ``imgs`` is uint8 (N, 3, H, W), channels as the data set loads them; returns
    ``image_feats`` (N, C, fH, fW).
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.img_backbone = detector.img_backbone
        self.img_neck = detector.img_neck
        mean, std, self.flips = image_norm(detector)
        self.register_buffer('mean', mean, persistent=False)
        self.register_buffer('std', std, persistent=False)

    def forward(self, imgs: Tensor) -> Tensor:
        x = (imgs.float() - self.mean) / self.std
        x = x.flip(1) if self.flips else x
        x = self.img_backbone(x)
        x = x if self.img_neck is None else self.img_neck(x)
        return x if isinstance(x, Tensor) else x[0]


def image_norm(detector: Any) -> tuple[Tensor, Tensor, bool]:
    """Reads how a detector normalises images.

    Returns:
        Mean and standard deviation, (1, 3, 1, 1), of the channels as loaded; and whether they
        change order.
    """
    processor = detector.data_preprocessor
    flips = bool(getattr(processor, '_channel_conversion', False))
    if not getattr(processor, '_enable_normalize', False):
        return torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1), flips
    mean, std = (t.detach().cpu().float().view(1, 3, 1, 1) for t in (processor.mean, processor.std))
    return (mean.flip(1), std.flip(1), flips) if flips else (mean, std, flips)


class MainBody(Body):
    """Image features and the LiDAR map to boxes of one frame.

    ``forward(lidar, points, lidar2image, img_aug_matrix, geom_feats, kept, ranks, indices,
    image_feats)``, as ``export.runtimes`` has them, without the second to fourth for a view
    transform that reads no points; returns as :class:`Body`.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__(detector)
        self.view_transform = detector.view_transform

    def forward(self, lidar: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        *depth, geom_feats, kept, ranks, indices, image_feats = rest
        view: Any = self.view_transform
        maps = [depth_maps(view.image_size, *depth)[None]] if depth else []
        context, weights = view.lift(image_feats[None], *maps)
        lifted = weights[..., None] * context.permute(0, 2, 3, 1)[:, None]
        lifted = lifted.reshape(-1, view.C)[kept][indices]
        nx, ny, nz = (int(n) for n in view.nx)
        pooled = pool(lifted, geom_feats, ranks, (nz, nx, ny))
        camera = view.downsample(pooled.permute(0, 1, 4, 2, 3).reshape(1, nz * view.C, nx, ny))
        return super().forward(camera, lidar)


def depth_maps(
    size: Sequence[int], points: Tensor, lidar2image: Tensor, img_aug_matrix: Tensor
) -> Tensor:
    """Projects points to a depth map of every image; the last of several at a pixel wins.

    Args:
        size: Height and width of the images.
        points: (P, >= 3), metres.
        lidar2image: (N, 4, 4).
        img_aug_matrix: (N, 4, 4).

    Returns:
        (N, 1, H, W), metres; 0 where no point falls.
    """
    height, width = size
    depth, row, col, inside = to_pixels(size, points[:, :3].T, lidar2image, img_aug_matrix)
    # One more cell behind each image takes what falls outside, so that no size depends on points.
    rows, cols = row.clamp(0, height - 1).long(), col.clamp(0, width - 1).long()
    cells = torch.where(inside, rows * width + cols, torch.full_like(rows, height * width))
    empty = torch.zeros_like(depth[:, :1]).expand(-1, height * width + 1)
    filled = empty.scatter(1, cells, depth)[:, : height * width]
    return filled.reshape(-1, 1, height, width)


def pool(lifted: Tensor, cells: Tensor, ranks: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Sums features by cell, (1, nz, nx, ny, C).

    Args:
        lifted: (K, C), in the order of the ranks.
        cells: (K, 4), int32: x, y, z, and the sample.
        ranks: (K,), ascending; equal in one cell.
        size: Cells along z, x, y.
    """
    first = torch.ones_like(ranks[:1], dtype=torch.bool)
    starts = torch.cat([first, ranks[1:] != ranks[:-1]]).nonzero()[:, 0]
    end = torch.zeros_like(starts[:1]) + ranks.shape[0]
    lengths = torch.cat([starts[1:], end]) - starts
    return _QuickCumsum.apply(lifted, cells, lengths.int(), starts.int(), size)


class _QuickCumsum(torch.autograd.Function):
    """Autoware's ``QuickCumsumCuda``."""

    @staticmethod
    def forward(ctx: Any, lifted: Tensor, cells: Tensor, lengths: Tensor, starts: Tensor, size):
        depth, height, width = size
        x, y, z = (cells[:, i].long() for i in range(3))
        flat = lifted.new_zeros(depth * height * width, lifted.shape[1])
        flat.index_add_(0, (z * height + x) * width + y, lifted)
        return flat.view(1, depth, height, width, -1)

    @staticmethod
    def symbolic(g: Any, lifted: Any, cells: Any, lengths: Any, starts: Any, size: Any) -> Any:
        depth, height, width = size
        fields = dict(batch_size_i=1, dimension_i=depth, height_i=height, width_i=width)
        out = g.op('autoware::QuickCumsumCuda', lifted, cells, lengths, starts, **fields)
        channels = lifted.type().sizes() and lifted.type().sizes()[-1]
        out.setType(lifted.type().with_sizes([1, depth, height, width, channels]))
        return out


@torch.no_grad()
def camera_inputs(detector: Any, batch: Any) -> dict[str, Tensor]:
    """Runs a detector on a batch of one sample and makes the camera inputs of Autoware's files.

    Returns:
        Tensors by name, as ``export.runtimes`` has them, and ``imgs``.
    """
    view = detector.view_transform
    seen: dict[str, Any] = {}
    hooks = [
        view.register_forward_pre_hook(lambda m, args: seen.update(view=args)),
        detector.img_backbone.register_forward_pre_hook(lambda m, args: seen.update(img=args[0])),
    ]
    try:
        detector.test_step(batch)
    finally:
        for hook in hooks:
            hook.remove()
    feats, points, lidar2image, intrinsics, camera2lidar, augmented, lidar_aug, *_ = seen['view']
    mean, std, flips = image_norm(detector)
    img = seen['img'].flip(1) if flips else seen['img']
    imgs = (img * std + mean).round().clamp(0, 255).to(torch.uint8)
    return dict(
        points=points[0].float(),
        lidar2image=lidar2image[0],
        img_aug_matrix=augmented[0],
        **pooling_inputs(view, camera2lidar, intrinsics, augmented),
        image_feats=feats[0],
        imgs=imgs,
    )


def pooling_inputs(
    view: Any, camera2lidar: Tensor, camera_intrinsics: Tensor, img_aug_matrix: Tensor
) -> dict[str, Tensor]:
    """Computes what Autoware computes from the cameras' matrices, once, for the BEV pooling.

    Args:
        view: The view transform.
        camera2lidar: (1, N, 4, 4).
        camera_intrinsics: (1, N, 4, 4).
        img_aug_matrix: (1, N, 4, 4).

    Returns:
        ``geom_feats`` int32 (K, 4), ``kept`` bool (N * D * fH * fW,), ``ranks`` int64 (K,) and
        ``indices`` int64 (K,).
    """
    geometry = view.get_geometry(
        camera2lidar[..., :3, :3],
        camera2lidar[..., :3, 3],
        camera_intrinsics[..., :3, :3],
        img_aug_matrix[..., :3, :3],
        img_aug_matrix[..., :3, 3],
    )
    cells = cells_of(geometry, view.bx, view.dx).reshape(-1, 3)
    size = torch.as_tensor(view.nx).to(cells)
    kept = ((cells >= 0) & (cells < size)).all(1)
    cells = cells[kept]
    ranks = (cells[:, 0] * size[1] + cells[:, 1]) * size[2] + cells[:, 2]
    indices = ranks.argsort(stable=True)
    cells = torch.cat([cells, torch.zeros_like(cells[:, :1])], 1)[indices]
    return dict(geom_feats=cells.int(), kept=kept, ranks=ranks[indices], indices=indices)
