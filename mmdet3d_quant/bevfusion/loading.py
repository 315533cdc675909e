"""Loads the camera images of one frame with their calibration."""

from __future__ import annotations

from typing import Any

import mmcv
import numpy as np
from mmdet3d.datasets.transforms import LoadMultiViewImageFromFiles
from mmengine.fileio import get

from mmdet3d_quant.core.compat import strict_zip


class BEVLoadMultiViewImageFromFiles(LoadMultiViewImageFromFiles):
    """Loads RGB images (decoded by Pillow) and the matrices that view transforms need.

    Takes the arguments of ``LoadMultiViewImageFromFiles``, for single frames:
    ``num_ref_frames`` must not be positive.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.num_ref_frames > 0:
            raise NotImplementedError(
                'BEVLoadMultiViewImageFromFiles loads single frames; expected '
                f'num_ref_frames <= 0, got {self.num_ref_frames}'
            )

    def transform(self, results: dict) -> dict:
        """Adds images and matrices of N cameras, in the order of ``results['images']``.

        Args:
            results: Frame with ``images``: per camera ``img_path``, ``cam2img`` (3, 3) and
                ``lidar2cam`` (4, 4), a rigid motion.

        Returns:
            ``results`` with ``img``, N arrays (H, W, 3), padded to a common shape; ``cam2img``,
            ``lidar2cam``, ``cam2lidar``, ``lidar2img`` and ``ori_cam2img``, (N, 4, 4); and the
            paths, shapes and defaults that mmdet3d's loader sets.
        """
        cameras = list(results['images'].values())
        paths = [camera['img_path'] for camera in cameras]
        images = self._images(paths)
        shape = images[0].shape[:2]
        channels = images[0].shape[2] if images[0].ndim > 2 else 1

        intrinsics = [_padded(camera['cam2img']) for camera in cameras]
        extrinsics = [np.asarray(camera['lidar2cam'], dtype=np.float32) for camera in cameras]
        results.update(
            img=images,
            img_path=paths,
            filename=paths,
            img_shape=shape,
            ori_shape=shape,
            pad_shape=shape,
            cam2img=np.stack(intrinsics),
            ori_cam2img=np.stack(intrinsics),
            lidar2cam=np.stack([camera['lidar2cam'] for camera in cameras]),
            cam2lidar=np.stack([_inverse(matrix) for matrix in extrinsics]),
            lidar2img=np.stack([k @ e for k, e in strict_zip(intrinsics, extrinsics)]),
            img_norm_cfg=dict(
                mean=np.zeros(channels, dtype=np.float32),
                std=np.ones(channels, dtype=np.float32),
                to_rgb=False,
            ),
            num_views=self.num_views,
            num_ref_frames=self.num_ref_frames,
        )
        if self.set_default_scale:
            results['scale_factor'] = 1.0
        return results

    def _images(self, paths: list[str]) -> list[np.ndarray]:
        """Decodes images, zero-padded at the right and bottom to the largest."""
        images = [
            mmcv.imfrombytes(
                get(path, backend_args=self.backend_args),
                flag=self.color_type,
                channel_order='rgb',
                backend='pillow',
            )
            for path in paths
        ]
        shape = tuple(max(sides) for sides in strict_zip(*(i.shape[:2] for i in images)))
        images = [i if i.shape[:2] == shape else mmcv.impad(i, shape=shape) for i in images]
        return [i.astype(np.float32) for i in images] if self.to_float32 else images


def _padded(matrix: Any) -> np.ndarray:
    """Puts a (3, 3) matrix into the corner of a (4, 4) identity, float32."""
    full = np.eye(4, dtype=np.float32)
    full[:3, :3] = matrix
    return full


def _inverse(rigid: np.ndarray) -> np.ndarray:
    """Inverts a rigid motion (4, 4), computed in its dtype and returned in float64."""
    inverse = np.eye(4)
    inverse[:3, :3] = rigid[:3, :3].T
    inverse[:3, 3:] = -(rigid[:3, :3].T @ rigid[:3, 3:])
    return inverse
