"""Labels of LiDAR points, from the boxes that they lie in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmcv.ops import points_in_boxes_cpu
from mmcv.transforms import BaseTransform


class LabelPoints(BaseTransform):
    """Writes the class of each point into its last column: 0 outside of all boxes, else label + 1.

    :class:`DepthSupervisedLSSTransform` teaches cameras with them; a LiDAR branch that read such
    points would read the answer. It needs ``points``, ``gt_bboxes_3d`` and ``gt_labels_3d``.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        boxes, points = results['gt_bboxes_3d'], results['points']
        labels = torch.zeros(len(points))
        if len(boxes):
            inside = points_in_boxes_cpu(points.tensor[None, :, :3], boxes.tensor[None, :, :7])[0]
            values = torch.as_tensor(np.asarray(results['gt_labels_3d'])).float() + 1
            labels = values[inside.argmax(1)] * inside.any(1)
        points.tensor[:, -1] = labels
        return results
