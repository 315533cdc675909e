"""BEVFusion, a detector that sees with cameras, LiDAR or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.ops import Voxelization
from mmdet3d.models import Base3DDetector
from mmdet3d.registry import MODELS
from mmdet3d.structures import Det3DDataSample
from torch import Tensor

from mmdet3d_quant.bevfusion.matrices import stack_matrices


class BEVFusion(Base3DDetector):
    """BEVFusion detector.

    Give the ``img_*`` parts and ``view_transform`` for cameras, the voxel encoder and
    ``pts_middle_encoder`` for LiDAR, or both and a ``fusion_layer``. ``pts_backbone`` and
    ``pts_neck`` process the bird's-eye view, whichever sensor it comes from.

    Args:
        data_preprocessor: Config of the preprocessor, with ``voxelize_cfg`` for LiDAR: the
            arguments of ``mmcv.ops.Voxelization`` and ``voxelize_reduce`` (must be true: a
            voxel is the mean of its points). Left unchanged.
        pts_voxel_encoder: Built and kept for its place in the model, never called:
            ``voxelize_reduce`` encodes a voxel, by the mean of its points.
        pts_middle_encoder: Config of the sparse encoder.
        fusion_layer: Config of the fuser; needed with both sensors.
        img_backbone: Config of the image backbone.
        pts_backbone: Config of the bird's-eye-view backbone.
        view_transform: Config of the view transform.
        img_neck: Config of the image neck; its first output is used.
        pts_neck: Config of the bird's-eye-view neck.
        bbox_head: Config of the head.
        init_cfg: Kept as in any mmengine model.
        seg_head: Must be None.
        train_cfg: Not used, the head has its own; mmdet3d's ``init_model`` passes it.
        test_cfg: Not used, the head has its own.

    Raises:
        ValueError: If the parts given do not make a detector.
    """

    def __init__(
        self,
        data_preprocessor: dict | None = None,
        pts_voxel_encoder: dict | None = None,
        pts_middle_encoder: dict | None = None,
        fusion_layer: dict | None = None,
        img_backbone: dict | None = None,
        pts_backbone: dict | None = None,
        view_transform: dict | None = None,
        img_neck: dict | None = None,
        pts_neck: dict | None = None,
        bbox_head: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
        seg_head: dict | None = None,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
    ) -> None:
        preprocessor = dict(data_preprocessor or {})
        voxelize_cfg = preprocessor.pop('voxelize_cfg', None)
        # Without a type, mmengine falls back to the plain preprocessor only for None.
        super().__init__(data_preprocessor=preprocessor or None, init_cfg=init_cfg)
        if seg_head is not None:
            raise ValueError('BEVFusion has no segmentation: expected seg_head=None')
        if (img_backbone is None) != (view_transform is None):
            raise ValueError('BEVFusion needs img_backbone and view_transform, or neither')
        sensors = (img_backbone is not None) + (pts_middle_encoder is not None)
        if sensors == 0 or (sensors == 2 and fusion_layer is None):
            raise ValueError(
                'BEVFusion needs img_backbone for cameras or pts_middle_encoder for LiDAR, and '
                'a fusion_layer if both are given'
            )

        self.pts_voxel_layer: Any = None
        if pts_middle_encoder is not None:
            self.pts_voxel_layer = _voxel_layer(voxelize_cfg)
        self.pts_voxel_encoder = _build(pts_voxel_encoder)
        self.img_backbone = _build(img_backbone)
        self.img_neck = _build(img_neck)
        self.view_transform = _build(view_transform)
        self.pts_middle_encoder = _build(pts_middle_encoder)
        self.fusion_layer = _build(fusion_layer)
        self.pts_backbone = _build(pts_backbone)
        self.pts_neck = _build(pts_neck)
        self.bbox_head = _build(bbox_head)

    def init_weights(self) -> None:
        """Initialises the image backbone; all other parts did so when they were built."""
        if self.img_backbone is not None:
            self.img_backbone.init_weights()

    def extract_img_feat(
        self,
        x: Tensor,
        points: Sequence[Tensor] | None,
        lidar2image: Tensor,
        camera_intrinsics: Tensor,
        camera2lidar: Tensor,
        img_aug_matrix: Tensor,
        lidar_aug_matrix: Tensor,
        img_metas: list[dict],
    ) -> Tensor:
        """Computes the bird's-eye-view map of images.

        Args:
            x: Normalised images, (B, N, 3, H, W).
            points: One (P, >=3) tensor per sample, metres, or None.
            lidar2image: (B, N, 4, 4).
            camera_intrinsics: (B, N, 4, 4).
            camera2lidar: (B, N, 4, 4).
            img_aug_matrix: (B, N, 4, 4).
            lidar_aug_matrix: (B, 4, 4).
            img_metas: Per sample the data sample's meta information.

        Returns:
            (B, C, X, Y).

        Raises:
            ValueError: If the images are not (B, N, 3, H, W).
        """
        if x.dim() != 5:
            raise ValueError(f'BEVFusion expects images (B, N, 3, H, W), got {tuple(x.shape)}')
        batch = len(x)
        x = self.img_backbone(x.flatten(0, 1))
        if self.img_neck is not None:
            x = self.img_neck(x)
        x = x if isinstance(x, Tensor) else x[0]
        # Geometry is rounded to cells: half precision would move them.
        with torch.autocast(x.device.type, enabled=False):
            return self.view_transform(
                x.float().unflatten(0, (batch, -1)),
                points,
                lidar2image,
                camera_intrinsics,
                camera2lidar,
                img_aug_matrix,
                lidar_aug_matrix,
                img_metas,
            )

    def extract_pts_feat(self, batch_inputs_dict: dict) -> Tensor:
        """Computes the bird's-eye-view map of points.

        Args:
            batch_inputs_dict: With ``points``, one (P, channels) tensor per sample.

        Returns:
            (B, C, X, Y).

        Raises:
            ValueError: If there are no point clouds.
        """
        points = batch_inputs_dict.get('points')
        if not points:
            raise ValueError(
                "BEVFusion was built with pts_middle_encoder and expects inputs['points'], one "
                f'tensor per sample; got inputs with {sorted(batch_inputs_dict)}'
            )
        feats, coords, _ = self.voxelize([p.float() for p in points])
        return self.pts_middle_encoder(feats, coords, len(points))

    @torch.no_grad()
    def voxelize(self, points: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Averages the points in each voxel.

        Args:
            points: One (P, channels) float tensor per sample, x, y, z in metres first.

        Returns:
            Means (V, channels); coordinates (V, 4), int32, columns (sample, x, y, z) in
            voxels; number of points averaged (V,), int32.

        Raises:
            ValueError: If a cloud is not finite.
        """
        feats, coords, sizes = [], [], []
        for sample, cloud in enumerate(points):
            if not torch.isfinite(cloud).all():
                raise ValueError(f'BEVFusion: points of sample {sample} hold NaN or infinity')
            voxels, zyx, size = self.pts_voxel_layer(cloud)
            feats.append(voxels)
            coords.append(F.pad(zyx.flip(1), (1, 0), value=sample))
            sizes.append(size)
        counts = torch.cat(sizes)
        sums = torch.cat(feats).sum(dim=1)
        return sums / counts.type_as(sums).unsqueeze(1), torch.cat(coords), counts

    def extract_feat(
        self, batch_inputs_dict: dict, batch_input_metas: list[dict]
    ) -> Tensor | Sequence[Tensor]:
        """Computes the input of the head.

        Args:
            batch_inputs_dict: ``imgs`` (B, N, 3, H, W) and ``points`` (one tensor per sample),
                as the model's parts need them.
            batch_input_metas: Per sample ``lidar2img``, ``cam2img`` and ``cam2lidar``, each
                N (4, 4); optionally ``img_aug_matrix``, N (4, 4), and ``lidar_aug_matrix``,
                (4, 4). Only needed with cameras.

        Returns:
            Output of ``pts_neck``.

        Raises:
            ValueError: If an input or a matrix is missing.
        """
        features = []
        if self.img_backbone is not None:
            imgs = batch_inputs_dict.get('imgs')
            if imgs is None:
                raise ValueError(
                    "BEVFusion was built with img_backbone and expects inputs['imgs']; got "
                    f'inputs with {sorted(batch_inputs_dict)}'
                )
            points = batch_inputs_dict.get('points')
            inputs = imgs, points, *stack_matrices(batch_input_metas, imgs), batch_input_metas
            features.append(self.extract_img_feat(*inputs))
        if self.pts_middle_encoder is not None:
            features.append(self.extract_pts_feat(batch_inputs_dict))
        x = features[0] if self.fusion_layer is None else self.fusion_layer(features)
        for part in (self.pts_backbone, self.pts_neck):
            x = x if part is None else part(x)
        return x

    def _forward(
        self, batch_inputs_dict: dict, batch_data_samples: list[Det3DDataSample] | None = None
    ) -> Any:
        """Computes the raw outputs of the head; mode ``'tensor'``."""
        metas = [sample.metainfo for sample in batch_data_samples or ()]
        return self.bbox_head(self.extract_feat(batch_inputs_dict, metas), metas)

    def predict(
        self, batch_inputs_dict: dict, batch_data_samples: list[Det3DDataSample]
    ) -> list[Det3DDataSample]:
        """Detects objects; mode ``'predict'``.

        Args:
            batch_inputs_dict: As :meth:`extract_feat` takes them.
            batch_data_samples: One per input sample.

        Returns:
            The data samples, with ``pred_instances_3d`` (boxes, scores and labels) added.
        """
        metas = [sample.metainfo for sample in batch_data_samples]
        boxes = self.bbox_head.predict(self.extract_feat(batch_inputs_dict, metas), metas)
        return self.add_pred_to_datasample(batch_data_samples, boxes)

    def loss(
        self, batch_inputs_dict: dict, batch_data_samples: list[Det3DDataSample]
    ) -> dict[str, Tensor]:
        """Computes the losses of a batch; mode ``'loss'``.

        Args:
            batch_inputs_dict: As :meth:`extract_feat` takes them.
            batch_data_samples: One per input sample, with ``gt_instances_3d``.

        Returns:
            Dict of losses by name: the head's, and those of a view transform that has some.
        """
        metas = [sample.metainfo for sample in batch_data_samples]
        features = self.extract_feat(batch_inputs_dict, metas)
        losses = self.bbox_head.loss(features, batch_data_samples)
        if hasattr(self.view_transform, 'pop_losses'):
            losses.update(self.view_transform.pop_losses())
        return losses


def _build(cfg: dict | None) -> Any:
    """Builds a part of the detector, or None; typed Any, since arguments differ by part."""
    return None if cfg is None else MODELS.build(cfg)


def _voxel_layer(cfg: dict | None) -> Voxelization:
    """Builds the voxelisation from ``voxelize_cfg``."""
    cfg = dict(cfg or {})
    if not cfg.pop('voxelize_reduce', False) or cfg.get('max_num_points', -1) <= 0:
        raise ValueError(
            'BEVFusion with pts_middle_encoder needs data_preprocessor.voxelize_cfg with '
            f'voxelize_reduce=True and max_num_points > 0, got {cfg}'
        )
    return Voxelization(**cfg)
