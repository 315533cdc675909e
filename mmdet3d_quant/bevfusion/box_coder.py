"""Coding of boxes as the head's bird's-eye-view regression targets, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.models.task_modules import BaseBBoxCoder
from torch import Tensor

from mmdet3d_quant.core.compat import strict_zip


class TransFusionBBoxCoder(BaseBBoxCoder):
    """Codes a box as cell position, gravity centre height, log size, sine and cosine of yaw.

    Args:
        pc_range: Lower corner of the map, x and y in metres (more entries are ignored).
        out_size_factor: Voxels per cell of the map.
        voxel_size: Voxel size along x and y, metres.
        post_center_range: Keeps boxes with centres in (x, y, z low, x, y, z high), metres.
        score_threshold: Keeps boxes that score higher; None and 0 keep all.
        code_size: 8, or 10 with velocity.
    """

    def __init__(
        self,
        pc_range: Sequence[float],
        out_size_factor: int,
        voxel_size: Sequence[float],
        post_center_range: Sequence[float] | None = None,
        score_threshold: float | None = None,
        code_size: int = 8,
    ) -> None:
        super().__init__()
        self.pc_range = pc_range
        self.out_size_factor = out_size_factor
        self.voxel_size = voxel_size
        self.post_center_range = post_center_range
        self.score_threshold = score_threshold
        self.code_size = code_size

    def encode(self, dst_boxes: Tensor) -> Tensor:
        """Encodes boxes as regression targets.

        Args:
            dst_boxes: (n, 7 or 9): x, y and bottom z in metres; size along x, y, z in metres;
                yaw in radians; velocity along x, y in m/s.

        Returns:
            (n, code_size), float32.
        """
        x, y, bottom, *size, yaw = dst_boxes[:, :7].unbind(1)
        columns = [
            (x - self.pc_range[0]) / (self.out_size_factor * self.voxel_size[0]),
            (y - self.pc_range[1]) / (self.out_size_factor * self.voxel_size[1]),
            bottom + size[2] * 0.5,
            *(s.log() for s in size),
            yaw.sin(),
            yaw.cos(),
        ]
        if self.code_size == 10:
            columns += dst_boxes[:, 7:9].unbind(1)
        return torch.stack(columns, dim=1).float()

    def decode(
        self,
        heatmap: Tensor,
        rot: Tensor,
        dim: Tensor,
        center: Tensor,
        height: Tensor,
        vel: Tensor | None,
        filter: bool = False,
    ) -> list[dict[str, Tensor]]:
        """Decodes outputs of the head to boxes; the inputs are left unchanged.

        Args:
            heatmap: Scores, (B, classes, P).
            rot: Sine and cosine of yaw, (B, 2, P).
            dim: Log of the size, (B, 3, P).
            center: Cell position, (B, 2, P).
            height: z of the gravity centre, (B, 1, P), metres.
            vel: (B, 2, P), m/s, or None.
            filter: Whether to apply ``post_center_range`` and ``score_threshold``.

        Returns:
            Per sample ``bboxes`` (n, 7 or 9) as :meth:`encode` takes them, ``scores`` (n,)
            and ``labels`` (n,), int64.
        """
        scores, labels = heatmap.max(dim=1)
        x, y = (
            center[:, i] * self.out_size_factor * self.voxel_size[i] + self.pc_range[i]
            for i in range(2)
        )
        size = dim.exp()
        bottom = height[:, 0] - size[:, 2] * 0.5
        yaw = torch.atan2(rot[:, 0], rot[:, 1])
        columns = [x, y, bottom, *size.unbind(1), yaw, *(() if vel is None else vel.unbind(1))]
        boxes = torch.stack(columns, dim=-1)

        keep = torch.ones_like(scores, dtype=torch.bool)
        if filter and self.post_center_range is not None:
            low, high = boxes.new_tensor(self.post_center_range).view(2, 3)
            keep &= ((boxes[..., :3] >= low) & (boxes[..., :3] <= high)).all(dim=-1)
        if filter and self.score_threshold:
            keep &= scores > self.score_threshold
        return [
            dict(bboxes=b[k], scores=s[k], labels=c[k])
            for b, s, c, k in strict_zip(boxes, scores, labels, keep)
        ]
