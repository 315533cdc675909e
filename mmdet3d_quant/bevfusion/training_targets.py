"""Training targets of the TransFusion head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmdet3d.models.utils import draw_heatmap_gaussian, gaussian_radius
from mmdet3d.structures import BaseInstance3DBoxes
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet3d_quant.bevfusion.assigner import HeuristicAssigner3D
from mmdet3d_quant.core.compat import strict_zip


@dataclass(frozen=True)
class Targets:
    """Targets of a batch of B samples with P proposals, all decoder layers in a row.

    Attributes:
        labels: Class of each proposal, the number of classes for background; int64 (B, P).
        label_weights: (B, P).
        bboxes: Regression targets as the box coder encodes them, (B, P, code size).
        bbox_weights: 1 for proposals with an object, else 0, (B, P, code size).
        heatmap: Gaussians around the objects, (B, classes, X, Y).
        num_pos: Proposals with an object.
        matched_iou: Mean overlap of proposals and their objects, averaged over samples.
    """

    labels: Tensor
    label_weights: Tensor
    bboxes: Tensor
    bbox_weights: Tensor
    heatmap: Tensor
    num_pos: int
    matched_iou: float


@torch.no_grad()
def make_targets(
    truth: Sequence[InstanceData],
    outputs: dict[str, Tensor],
    assigner: Any,
    coder: Any,
    train_cfg: dict[str, Any],
    num_proposals: int,
) -> Targets:
    """Assigns objects to proposals, layer by layer, and encodes them.

    Args:
        truth: Per sample ``bboxes_3d`` and ``labels_3d``.
        outputs: Result of the head's forward, left unchanged; B samples, P proposals of
            ``num_proposals`` per decoder layer.
        assigner: One of :mod:`mmdet3d_quant.bevfusion.assigner`.
        coder: The box coder.
        train_cfg: ``pos_weight`` and what :func:`heatmap_targets` and the assigner need.
        num_proposals: Proposals of one decoder layer.
    """
    logits = outputs['heatmap']
    num_classes, device = logits.shape[1], logits.device
    shape = (len(logits), logits.shape[2])
    decoded = coder.decode(
        logits,
        outputs['rot'],
        outputs['dim'],
        outputs['center'],
        outputs['height'],
        outputs.get('vel'),
    )
    labels = torch.full(shape, num_classes, dtype=torch.long, device=device)
    label_weights = torch.ones(shape, device=device)
    bboxes = torch.zeros(*shape, coder.code_size, device=device)
    bbox_weights = torch.zeros_like(bboxes)
    heatmaps, overlaps = [], []
    num_pos = 0
    pos_weight = train_cfg['pos_weight'] if train_cfg['pos_weight'] > 0 else 1.0
    for i, objects in enumerate(truth):
        gt_labels = objects.labels_3d.to(device)
        gt_bboxes = objects.bboxes_3d.tensor.to(device)
        assigned, ious = [], []
        for start in range(0, shape[1], num_proposals):
            layer = slice(start, start + num_proposals)
            boxes = decoded[i]['bboxes'][layer]
            if isinstance(assigner, HeuristicAssigner3D):
                assignment = assigner.assign(
                    boxes, gt_bboxes, None, gt_labels, outputs['query_labels'][i]
                )
            else:
                scores = logits[i : i + 1, :, layer]
                assignment = assigner.assign(boxes, gt_bboxes, gt_labels, scores, train_cfg)
            assigned.append(assignment.gt_inds)
            ious.append(assignment.max_overlaps)
        index = torch.cat(assigned)
        positive = index > 0
        if positive.any():
            chosen = index[positive] - 1
            labels[i, positive] = gt_labels[chosen]
            label_weights[i, positive] = pos_weight
            bboxes[i, positive] = coder.encode(gt_bboxes[chosen])
            bbox_weights[i, positive] = 1.0
        count = int(positive.sum())
        num_pos += count
        overlaps.append(float(torch.cat(ious)[positive].clamp(0, 1).sum()) / max(count, 1))
        heatmaps.append(
            heatmap_targets(objects.bboxes_3d.to(device), gt_labels, num_classes, train_cfg)
        )
    return Targets(
        labels=labels,
        label_weights=label_weights,
        bboxes=bboxes,
        bbox_weights=bbox_weights,
        heatmap=torch.stack(heatmaps),
        num_pos=num_pos,
        matched_iou=sum(overlaps) / len(overlaps),
    )


def heatmap_targets(
    boxes: BaseInstance3DBoxes, labels: Tensor, num_classes: int, train_cfg: dict[str, Any]
) -> Tensor:
    """Draws one Gaussian per object, 1 at its cell; its radius after CornerNet (gaussian_overlap).

    Args:
        boxes: Objects. One without extent draws nothing; one with its centre just off the map draws
            the part of its Gaussian that lies on the map.
        labels: Their classes, int64 (n,).
        num_classes: Number of classes.
        train_cfg: ``grid_size`` (voxels), ``point_cloud_range`` (metres), ``voxel_size``
            (metres), ``out_size_factor``, ``gaussian_overlap``, ``min_radius`` (cells).

    Returns:
        (num_classes, X, Y), float32.
    """
    factor = train_cfg['out_size_factor']
    size = [n // factor for n in train_cfg['grid_size'][:2]]
    cell = boxes.tensor.new_tensor(train_cfg['voxel_size'][:2]) * factor
    low = boxes.tensor.new_tensor(train_cfg['point_cloud_range'][:2])
    heatmap = boxes.tensor.new_zeros(num_classes, *size)
    centres = ((boxes.gravity_center[:, :2] - low) / cell).int()
    extents = boxes.tensor[:, 3:5] / cell
    for centre, extent, label in strict_zip(centres, extents, labels):
        if (extent > 0).all():
            radius = gaussian_radius(extent.flip(0), min_overlap=train_cfg['gaussian_overlap'])
            radius = max(train_cfg['min_radius'], int(radius))
            # mmdet3d draws at (column, row); rows are x here.
            draw_heatmap_gaussian(heatmap[label], centre.flip(0), radius)
    return heatmap
