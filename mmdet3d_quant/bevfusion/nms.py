"""Non-maximum suppression of heatmap cells and of boxes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmdet3d.models import circle_nms
from torch import Tensor

#: Classes so small that every cell is a peak of its own, by data set.
_SMALL = {'nuScenes': [8, 9], 'Waymo': [1, 2]}
#: Radius of the circle NMS of a class, by data set, in metres; other classes have none.
_RADIUS = {'nuScenes': {8: 0.175, 9: 0.175}, 'Waymo': {0: 0.7, 1: 0.7, 2: 0.7}}


def heatmap_peaks(scores: Tensor, num_classes: int, kernel: int, dataset: str) -> Tensor:
    """Finds the cells that no neighbour exceeds.

    Args:
        scores: By class, (B, classes, X, Y), positive.
        num_classes: Number of classes.
        kernel: Side of the window in which a peak is the maximum, cells, odd.
        dataset: Name of the data set; decides in which classes every cell is a peak.

    Returns:
        (B, classes, X*Y): scores of the peaks, 0 elsewhere.
    """
    # A full window must fit: cells at the edge of the map are no peaks.
    highest = F.pad(F.max_pool2d(scores, kernel, stride=1), [kernel // 2] * 4)
    small = _SMALL.get(dataset, [])
    # Chosen, not written into: that would be a scatter with a fixed batch once exported.
    alone = [[[label in small]] for label in range(num_classes)]
    highest = torch.where(torch.tensor(alone, device=scores.device), scores, highest)
    return (scores * (scores == highest)).flatten(2)


def kept_by_circle_nms(bboxes: Tensor, scores: Tensor, labels: Tensor, dataset: str) -> Tensor:
    """Finds the boxes with no better one of their class within the radius of the class.

    Args:
        bboxes: (n, >=2), x and y of the centres in metres first.
        scores: (n,).
        labels: (n,).
        dataset: Name of the data set; decides on the radii.

    Returns:
        (n,), bool.
    """
    keep = torch.ones_like(labels, dtype=torch.bool)
    for label, radius in _RADIUS.get(dataset, {}).items():
        same = (labels == label).nonzero().squeeze(1)
        circles = torch.cat([bboxes[same, :2], scores[same, None]], dim=1)
        chosen = circle_nms(circles.detach().cpu().numpy(), radius)
        keep[same] = False
        keep[same[chosen]] = True
    return keep
