"""Average precision of boxes, against the devkit's definition by hand."""

import numpy as np
import pytest

from mmdet3d_quant.sensitivity.boxes import DISTANCES, Boxes, as_truth, score


def boxes(centers, labels=None, scores=None):
    count = len(centers)
    return Boxes(
        np.array(centers, dtype=float).reshape(-1, 2),
        np.array(labels if labels is not None else [0] * count),
        np.array(scores if scores is not None else np.linspace(0.9, 0.5, count)),
    )


def by_hand(hits, positives):
    """AP of hits in the order of confidence, as nuScenes defines it."""
    hits = np.array(hits, dtype=float)
    precision, recall = np.cumsum(hits) / np.arange(1, len(hits) + 1), np.cumsum(hits) / positives
    at = np.interp(np.linspace(0, 1, 101), recall, precision, right=0)
    return np.maximum(at[11:] - 0.1, 0).mean() / 0.9


def test_equal_boxes_score_all_points():
    truth = [boxes([[0, 0], [9, 9]], [0, 1]), boxes([[3, 3]], [1])]
    value, draws = score(truth, truth)
    assert value == pytest.approx(100) and max(draws) == pytest.approx(100)


def test_a_box_that_is_off_is_a_hit_from_its_distance_on():
    truth, found = [boxes([[0, 0]])], [boxes([[0, 1.5]])]
    assert score(found, truth)[0] == pytest.approx(100 * sum(d > 1.5 for d in DISTANCES) / 4)


def test_misses_doubles_and_wrong_classes_cost_as_by_hand():
    truth = [boxes([[0, 0], [10, 0], [20, 0], [30, 0]])]
    found = [boxes([[0, 0], [0.1, 0], [10, 0], [50, 0], [20, 0], [30, 0]], [0] * 5 + [1])]
    # the second one finds its truth taken, the fourth is far from all, the last of another class
    assert score(found, truth)[0] == pytest.approx(100 * by_hand([1, 0, 1, 0, 1], 4))


def test_classes_count_alike_and_frames_are_apart():
    truth = [boxes([[0, 0]], [0]), boxes([[0, 0], [5, 5]], [1, 1])]
    found = [boxes([[0, 0]], [0]), boxes([[0, 0]], [0])]  # the second frame has class 0 wrongly
    hits = by_hand([1, 0], 1)
    assert score(found, truth)[0] == pytest.approx(100 * (hits + 0) / 2)


def test_the_truth_is_what_the_model_is_sure_of():
    sure = as_truth(boxes([[0, 0], [1, 1], [2, 2]], scores=[0.9, 0.2, 0.1]), 0.2)
    assert len(sure.labels) == 2
    with pytest.raises(ValueError, match='take more frames'):
        score([boxes([])], [as_truth(boxes([[0, 0]], scores=[0.1]), 0.2)])
