"""Mean average precision against labels, or against the boxes of the float model as the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.data.evaluation import Matches

#: Largest distances of a hit from the truth on the ground, metres, as nuScenes has them.
DISTANCES = (0.5, 1.0, 2.0, 4.0)
#: Resampled sets of frames, for the spread of a score.
DRAWS = 100


@dataclass(frozen=True)
class Boxes:
    """Boxes of one frame.

    Attributes:
        centers: Places on the ground, metres, (n, 2).
        labels: Numbers of the classes, int (n,).
        scores: Confidence, 0 to 1, (n,); of a truth not read.
    """

    centers: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def boxes_of(sample: Any) -> Boxes:
    """Reads the detections of a sample that ``test_step`` returned."""
    found = sample.pred_instances_3d
    return _boxes(found.bboxes_3d, found.labels_3d.cpu().numpy(), found.scores_3d.cpu().numpy())


def labels_of(sample: Any) -> Boxes | None:
    """Reads the labelled boxes of a sample; None if it has none to be evaluated with."""
    truth = sample.get('eval_ann_info', None)
    if not truth or 'gt_bboxes_3d' not in truth:
        return None
    labels = np.asarray(truth['gt_labels_3d'])
    boxes = _boxes(truth['gt_bboxes_3d'], labels, np.ones(len(labels)))
    return _kept(boxes, labels >= 0)


def _boxes(boxes: Any, labels: np.ndarray, scores: np.ndarray) -> Boxes:
    axes = [0, 2] if type(boxes).__name__.startswith('Camera') else [0, 1]
    centers = boxes.gravity_center.detach().cpu().numpy().reshape(-1, 3)[:, axes]
    return Boxes(centers, labels, scores)


def _kept(boxes: Boxes, mask: np.ndarray) -> Boxes:
    return Boxes(boxes.centers[mask], boxes.labels[mask], boxes.scores[mask])


def as_truth(boxes: Boxes, least: float) -> Boxes:
    """Takes the detections that a model is sure of for the truth."""
    return _kept(boxes, boxes.scores >= least)


def score(found: Sequence[Boxes], truth: Sequence[Boxes]) -> tuple[float, list[float]]:
    """Scores detections by mean average precision, computed as nuScenes does.

    Args:
        found: Detections by frame.
        truth: Boxes by frame, in the same order.

    Returns:
        mAP in points, 0 to 100, over the classes that the truth has and all :data:`DISTANCES`; and
        the same on :data:`DRAWS` resampled sets of frames, the same ones for any detections.

    Raises:
        ValueError: If the truth is empty.
    """
    classes = sorted({int(label) for boxes in truth for label in boxes.labels})
    if not classes:
        raise ValueError('there is no box in the truth of these frames: take more frames')
    matches = [
        _match(
            [_kept(f, f.labels == label) for f in found],
            [_kept(t, t.labels == label) for t in truth],
            distance,
        )
        for label in classes
        for distance in DISTANCES
    ]
    rng = np.random.default_rng(0)
    draws = [
        np.bincount(rng.integers(len(truth), size=len(truth)), minlength=len(truth))
        for _ in range(DRAWS)
    ]

    def mean(times: np.ndarray | None = None) -> float:
        return 100 * float(np.mean([m.average_precision(times) for m in matches]))

    return mean(), [mean(times) for times in draws]


def _match(found: Sequence[Boxes], truth: Sequence[Boxes], distance: float) -> Matches:
    """Matches the boxes of one class, the surest first, each with the nearest that is free."""
    frame = np.concatenate([np.full(len(f.scores), i) for i, f in enumerate(found)]).astype(int)
    place = np.concatenate([np.arange(len(f.scores)) for f in found]).astype(int)
    order = np.argsort(-np.concatenate([f.scores for f in found]), kind='stable')
    free = [np.ones(len(t.labels), dtype=bool) for t in truth]
    hit = np.zeros(len(order), dtype=bool)
    for i, (at, which) in enumerate(strict_zip(frame[order], place[order])):
        away = np.linalg.norm(truth[at].centers - found[at].centers[which], axis=1)
        away = np.where(free[at], away, np.inf)
        if len(away) and away.min() < distance:
            hit[i] = True
            free[at][away.argmin()] = False
    return Matches(hit, frame[order], np.array([len(t.labels) for t in truth]))
