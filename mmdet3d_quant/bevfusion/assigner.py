"""Assignment of ground-truth objects to the head's proposals, for training."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.task_modules import AssignResult
from mmdet3d.registry import TASK_UTILS
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor

_IOU = dict(type='BboxOverlaps3D', coordinate='lidar')


class BBoxBEVL1Cost:
    """Matching cost: L1 distance of centres from above, in units of the map's sides.

    Args:
        weight: Factor.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, bboxes: Tensor, gt_bboxes: Tensor, train_cfg: dict[str, Any]) -> Tensor:
        """Computes the cost of every pair of proposal and object, (P, n).

        Args:
            bboxes: Proposals (P, >=2), x and y in metres.
            gt_bboxes: Objects (n, >=2), x and y in metres.
            train_cfg: With ``point_cloud_range``, metres.
        """
        low, high = bboxes.new_tensor(train_cfg['point_cloud_range']).view(2, 3)[:, :2]
        size = high - low
        apart = torch.cdist((bboxes[:, :2] - low) / size, (gt_bboxes[:, :2] - low) / size, p=1)
        return apart * self.weight


class IoU3DCost:
    """Matching cost: the negative 3D overlap (IoU).

    Args:
        weight: Factor.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, iou: Tensor) -> Tensor:
        """Computes the costs of overlaps, in their shape."""
        return -iou * self.weight


class HungarianAssigner3D:
    """Assigns each object one proposal, at the least total cost (as in DETR).

    Args:
        cls_cost: Config of the cost of class scores.
        reg_cost: Config of the cost of centres.
        iou_cost: Config of the cost of overlaps.
        iou_calculator: Config of the calculator of overlaps.
    """

    def __init__(
        self,
        cls_cost: dict = dict(type='mmdet.ClassificationCost', weight=1.0),  # noqa: B006
        reg_cost: dict = dict(type='BBoxBEVL1Cost', weight=1.0),  # noqa: B006
        iou_cost: dict = dict(type='IoU3DCost', weight=1.0),  # noqa: B006
        iou_calculator: dict = _IOU,
    ) -> None:
        self.cls_cost = TASK_UTILS.build(cls_cost)
        self.reg_cost = TASK_UTILS.build(reg_cost)
        self.iou_cost = TASK_UTILS.build(iou_cost)
        self.iou_calculator = TASK_UTILS.build(iou_calculator)

    def assign(
        self,
        bboxes: Tensor,
        gt_bboxes: Tensor,
        gt_labels: Tensor,
        cls_pred: Tensor,
        train_cfg: dict[str, Any],
    ) -> AssignResult:
        """Assigns objects to proposals.

        Args:
            bboxes: Proposals (P, 7 or 9), metres and radians.
            gt_bboxes: Objects (n, 7 or 9).
            gt_labels: Classes of the objects, int64 (n,).
            cls_pred: Class logits of the proposals, (1, classes, P).
            train_cfg: With ``point_cloud_range``.

        Returns:
            Per proposal ``gt_inds`` (object number plus 1, 0 for none), ``labels`` (-1 for
            none) and ``max_overlaps`` (overlap with its object, 0 for none).
        """
        result = _nothing(bboxes, len(gt_bboxes))
        if len(gt_bboxes) == 0 or len(bboxes) == 0:
            return result
        iou = self.iou_calculator(bboxes, gt_bboxes)
        cost = (
            self.cls_cost(InstanceData(scores=cls_pred[0].T), InstanceData(labels=gt_labels))
            + self.reg_cost(bboxes, gt_bboxes, train_cfg)
            + self.iou_cost(iou)
        )
        rows, cols = (
            torch.from_numpy(i).to(bboxes.device)
            for i in linear_sum_assignment(cost.detach().cpu())
        )
        result.gt_inds[rows] = cols + 1
        result.labels[rows] = gt_labels[cols]
        result.max_overlaps[rows] = iou[rows, cols].to(result.max_overlaps)
        return result


class HeuristicAssigner3D:
    """Assigns each object its nearest proposal; the nearest, then first, object keeps a shared one.

    Args:
        dist_thre: Greatest distance of centres from above, metres.
        iou_calculator: Config of the calculator of overlaps.
    """

    def __init__(self, dist_thre: float = 100, iou_calculator: dict = _IOU) -> None:
        self.dist_thre = dist_thre
        self.iou_calculator = TASK_UTILS.build(iou_calculator)

    def assign(
        self,
        bboxes: Tensor,
        gt_bboxes: Tensor,
        gt_bboxes_ignore: Tensor | None = None,
        gt_labels: Tensor | None = None,
        query_labels: Tensor | None = None,
    ) -> AssignResult:
        """Assigns objects to proposals.

        Args:
            bboxes: Proposals (P, 7 or 9), metres and radians.
            gt_bboxes: Objects (n, 7 or 9).
            gt_bboxes_ignore: Not used.
            gt_labels: Classes of the objects, int64 (n,); must be given if there are any.
            query_labels: Classes of the proposals, int64 (P,): others do not match.

        Returns:
            As :meth:`HungarianAssigner3D.assign`.
        """
        result = _nothing(bboxes, len(gt_bboxes))
        if len(gt_bboxes) == 0 or len(bboxes) == 0:
            return result
        assert gt_labels is not None, 'objects need classes'
        # Not torch.cdist, which multiplies matrices and is then centimetres off.
        apart = (gt_bboxes[:, None, :2] - bboxes[None, :, :2]).norm(dim=-1)
        if query_labels is not None:
            apart += (query_labels[None] != gt_labels[:, None]) * self.dist_thre
        distance, proposal = apart.min(dim=1)
        # From far to near, so that the nearest object is written last; of equals the first.
        for i in distance.argsort(stable=True).flip(0).tolist():
            if distance[i] <= self.dist_thre:
                result.gt_inds[proposal[i]] = i + 1
                result.labels[proposal[i]] = gt_labels[i]
        matched = result.gt_inds > 0
        iou = self.iou_calculator(gt_bboxes[result.gt_inds[matched] - 1], bboxes[matched])
        result.max_overlaps[matched] = iou.diagonal()
        return result


def _nothing(bboxes: Tensor, num_gts: int) -> AssignResult:
    """Creates the assignment of a sample without objects: all proposals are background."""
    count = (len(bboxes),)
    return AssignResult(
        num_gts,
        bboxes.new_zeros(count, dtype=torch.long),
        bboxes.new_zeros(count),
        labels=bboxes.new_full(count, -1, dtype=torch.long),
    )
