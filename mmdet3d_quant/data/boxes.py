"""Detections on disk, as plain tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.structures import InstanceData

from mmdet3d_quant.files.outputs import whole


def save_boxes(results: list[dict[str, Any]], path: Path) -> None:
    """Writes detections.

    Args:
        results: As ``evaluation.predict`` returns them.
        path: File to write.
    """
    rows = []
    for sample in results:
        instances = sample['pred_instances_3d']
        tensors = (instances.bboxes_3d.tensor, instances.scores_3d, instances.labels_3d)
        rows.append((sample['sample_idx'], *tensors))
    with whole(path) as part:
        torch.save(rows, part)


def load_boxes(path: Path) -> list[dict[str, Any]]:
    """Reads a file of :func:`save_boxes`, in the form of ``evaluation.predict``."""
    results = []
    for index, boxes, scores, labels in torch.load(path, weights_only=True):
        instances = InstanceData(
            bboxes_3d=LiDARInstance3DBoxes(boxes, box_dim=boxes.shape[1]),
            scores_3d=scores,
            labels_3d=labels,
        )
        results.append(dict(sample_idx=index, pred_instances_3d=instances))
    return results
