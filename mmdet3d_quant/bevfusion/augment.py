"""Training augmentations of the scene and the images, as BEVFusion's configs name them.

Each move of the scene is multiplied onto ``lidar_aug_matrix``, which the view transforms undo
before they project points into the images.
"""

from __future__ import annotations

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet3d.datasets import GlobalRotScaleTrans
from PIL import Image

from mmdet3d_quant.core.compat import strict_zip


class BEVFusionGlobalRotScaleTrans(GlobalRotScaleTrans):
    """``GlobalRotScaleTrans`` in the order rotate, translate, scale; takes its arguments."""

    def transform(self, results: dict) -> dict:
        """Moves points and boxes.

        Args:
            results: Frame with ``points``, ``gt_bboxes_3d`` or both.

        Returns:
            ``results`` with both moved, the three drawn values (``pcd_rotation`` (3, 3),
            ``pcd_scale_factor``, ``pcd_trans`` (3,)) and the move multiplied onto
            ``lidar_aug_matrix``, (4, 4), float64.
        """
        self._rot_bbox_points(results)
        if 'pcd_scale_factor' not in results:
            self._random_scale(results)
        self._trans_bbox_points(results)
        self._scale_bbox_points(results)
        results.setdefault('transformation_3d_flow', []).extend(['R', 'T', 'S'])

        scale = results['pcd_scale_factor']
        move = np.eye(4)
        move[:3, :3] = results['pcd_rotation'].T * scale
        move[:3, 3] = results['pcd_trans'] * scale
        results['lidar_aug_matrix'] = move @ results.get('lidar_aug_matrix', np.eye(4))
        return results


class BEVFusionRandomFlip3D(BaseTransform):
    """Mirrors the scene along y, along x, both or neither, each with probability 1/2."""

    def transform(self, results: dict) -> dict:
        """Mirrors points, boxes and map masks.

        Args:
            results: Frame with any of ``points``, ``gt_bboxes_3d`` and ``gt_masks_bev``
                (classes, x, y).

        Returns:
            ``results`` with all of them mirrored and the mirroring multiplied onto
            ``lidar_aug_matrix``, (4, 4), float64.
        """
        drawn = np.random.choice([0, 1]), np.random.choice([0, 1])
        # Name of the flip, the axis whose sign it changes, the axis of a mask.
        flips = (('horizontal', 1, 2), ('vertical', 0, 1))
        move = np.eye(4)
        for flip, (direction, axis, mask_axis) in strict_zip(drawn, flips):
            if not flip:
                continue
            move[axis, axis] = -1
            for key in ('points', 'gt_bboxes_3d'):
                if key in results:
                    results[key].flip(direction)
            if 'gt_masks_bev' in results:
                results['gt_masks_bev'] = np.flip(results['gt_masks_bev'], mask_axis).copy()
        results['lidar_aug_matrix'] = move @ results.get('lidar_aug_matrix', np.eye(4))
        return results


class GridMask(BaseTransform):
    """Blanks stripes or a grid of random pitch in all images of a frame.

    Args:
        use_h: Whether to draw horizontal stripes.
        use_w: Whether to draw vertical stripes.
        max_epoch: Epoch at which ``prob`` is reached.
        rotate: Upper bound (excluded) of the drawn angle, integer degrees.
        offset: Whether to fill the blank with uniform noise in (-1, 1) instead of 0.
        ratio: Width of a stripe over its pitch.
        mode: 0 blanks the stripes, 1 everything else.
        prob: Probability of blanking at all.
        fixed_prob: Whether ``prob`` holds from the start; else it grows linearly with epochs.
    """

    def __init__(
        self,
        use_h: bool,
        use_w: bool,
        max_epoch: int,
        rotate: int = 1,
        offset: bool = False,
        ratio: float = 0.5,
        mode: int = 0,
        prob: float = 1.0,
        fixed_prob: bool = False,
    ) -> None:
        self.use_h = use_h
        self.use_w = use_w
        self.max_epoch = max_epoch
        self.rotate = rotate
        self.offset = offset
        self.ratio = ratio
        self.mode = mode
        self.st_prob = prob
        self.prob = prob
        self.epoch: int | None = None
        self.fixed_prob = fixed_prob

    def set_epoch(self, epoch: int) -> None:
        """Sets the current epoch, on which the probability depends."""
        self.epoch = epoch
        if not self.fixed_prob:
            self.prob = self.st_prob * epoch / self.max_epoch

    def transform(self, results: dict) -> dict:
        """Blanks the same pixels of every image.

        Args:
            results: Frame with ``img``, N arrays (H, W, 3) of one shape.

        Returns:
            ``results``, with ``img`` replaced where it was blanked.
        """
        if np.random.rand() > self.prob:
            return results
        images = results['img']
        height, width = images[0].shape[:2]
        keep = self._mask(height, width)[:, :, None]
        fill: float | np.ndarray = 0.0
        if self.offset:
            noise = (2 * (np.random.rand(height, width) - 0.5)).astype(np.float32)
            fill = (1 - keep) * noise[:, :, None]
        results['img'] = [image * keep + fill for image in images]
        return results

    def _mask(self, height: int, width: int) -> np.ndarray:
        """Draws a mask, float32 (height, width): 1 where the image stays, 0 elsewhere."""
        rows, cols = int(1.5 * height), int(1.5 * width)  # room for the rotation
        pitch = np.random.randint(2, min(height, width))
        if self.ratio == 1:
            stripe = np.random.randint(1, pitch)
        else:
            stripe = min(max(int(pitch * self.ratio + 0.5), 1), pitch - 1)
        mask = np.ones((rows, cols), np.uint8)
        first_row, first_col = np.random.randint(pitch), np.random.randint(pitch)
        if self.use_h:
            for i in range(rows // pitch):
                mask[pitch * i + first_row :][:stripe] = 0
        if self.use_w:
            for i in range(cols // pitch):
                mask[:, pitch * i + first_col :][:, :stripe] = 0
        turned = np.asarray(Image.fromarray(mask).rotate(np.random.randint(self.rotate)))
        top, left = (rows - height) // 2, (cols - width) // 2
        mask = turned[top : top + height, left : left + width].astype(np.float32)
        return 1 - mask if self.mode == 1 else mask
