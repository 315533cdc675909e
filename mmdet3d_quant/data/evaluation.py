"""mAP and NDS of nuScenes, and their spread over resampled validation sets."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet3d.evaluation.metrics import NuScenesMetric
from mmengine.fileio import load
from nuscenes import NuScenes
from nuscenes.eval.common.utils import center_distance
from nuscenes.eval.detection.evaluate import NuScenesEval
from torch import nn

from mmdet3d_quant.core.compat import strict_zip

_SPLIT = {'v1.0-mini': 'mini_val', 'v1.0-trainval': 'val'}
_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Matches:
    """Detections of one class at one distance threshold, best first, as the devkit matches them.

    Attributes:
        hit: Whether each of n detections is a true positive; bool (n,).
        sample: Row of each detection's sample; int64 (n,).
        positives: Ground-truth boxes of the class in every sample; int64 (samples,).
    """

    hit: np.ndarray
    sample: np.ndarray
    positives: np.ndarray

    def average_precision(self, times: np.ndarray | None = None) -> float:
        """Computes average precision as nuScenes does: recall and precision above 0.1 count.

        Args:
            times: How often each sample counts, (samples,); once by default.
        """
        if times is None:
            times = np.ones(len(self.positives))
        weight = times[self.sample].astype(float)
        hits, all_ = np.cumsum(weight * self.hit), np.cumsum(weight)
        total = float(times @ self.positives)
        if not len(hits) or not hits[-1] or not total:
            return 0.0
        seen = all_ > 0
        precision = np.interp(_RECALLS, hits[seen] / total, hits[seen] / all_[seen], right=0)
        return float(np.maximum(precision[11:] - 0.1, 0).mean() / 0.9)


@dataclass(frozen=True)
class Scores:
    """Scores of a set of detections, by nuScenes' devkit.

    Attributes:
        mAP: Mean average precision over classes and distance thresholds, 0 to 1.
        NDS: nuScenes detection score, 0 to 1.
        ap: Average precision of each class, 0 to 1.
        errors: Mean errors of true positives: ``trans_err`` (m), ``scale_err``, ``orient_err``
            (rad), ``vel_err`` (m/s), ``attr_err``.
        matches: For :func:`bootstrap`: of every class, one entry per distance threshold.
        clusters: Cluster of each sample, int64 (samples,): samples that show the same objects.
    """

    mAP: float
    NDS: float
    ap: dict[str, float]
    errors: dict[str, float]
    matches: dict[str, list[Matches]]
    clusters: np.ndarray


def predict(model: nn.Module, batches: Iterable[Any]) -> list[dict[str, Any]]:
    """Runs a detector on batches.

    Args:
        model: Detector in eval mode, in the quantization mode to measure.
        batches: Collated batches, as a data loader gives them.

    Returns:
        Per sample ``sample_idx`` and ``pred_instances_3d``, on the CPU.
    """
    results = []
    with torch.no_grad():
        for batch in batches:
            for sample in model.test_step(batch):
                boxes = sample.pred_instances_3d.to('cpu')
                results.append(dict(sample_idx=sample.sample_idx, pred_instances_3d=boxes))
    return results


class Scorer:
    """Scores detections on the validation split of a nuScenes data set, real or synthetic.

    Args:
        evaluator: Config of a ``NuScenesMetric``: ``data_root``, ``ann_file``.
        metainfo: Of the data set: ``classes`` and ``version``.
    """

    def __init__(self, evaluator: dict[str, Any], metainfo: dict[str, Any]) -> None:
        kwargs = {k: v for k, v in evaluator.items() if k != 'type'}
        self.metric = NuScenesMetric(**kwargs)
        self.metric.dataset_meta = dict(metainfo)
        self.metric.version = metainfo['version']
        self.nusc = NuScenes(
            version=metainfo['version'], dataroot=kwargs['data_root'], verbose=False
        )

    def score(self, results: list[dict[str, Any]]) -> Scores:
        """Scores the detections of :func:`predict`.

        Args:
            results: Detections of every sample of the split, in any order.
        """
        metric = self.metric
        with tempfile.TemporaryDirectory() as folder, _quiet():
            metric.data_infos = load(metric.ann_file)['data_list']
            files, _ = metric.format_results(results, metric.dataset_meta['classes'], folder)
            evaluation = NuScenesEval(
                self.nusc,
                config=metric.eval_detection_configs,
                result_path=files['pred_instances_3d'],
                eval_set=_SPLIT[metric.version],
                output_dir=str(Path(folder) / 'scores'),
                verbose=False,
            )
            metrics, _ = evaluation.evaluate()
        tokens = evaluation.sample_tokens
        return Scores(
            mAP=metrics.mean_ap,
            NDS=metrics.nd_score,
            ap=dict(metrics.mean_dist_aps),
            errors=dict(metrics.tp_errors),
            matches=_match(evaluation),
            clusters=_clusters(self.nusc, tokens),
        )


def bootstrap(scores: list[Scores], draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Computes mAP on resampled validation sets, the same ones for every entry.

    Samples that show the same objects are drawn together, since their errors are correlated: in
    nuScenes those of one scene, in the synthetic set those of one layout.

    Args:
        scores: Scores on the same samples; differences between rows tell drops from luck.
        draws: Number of resampled sets.
        seed: Seed of the draws.

    Returns:
        mAP, (len(scores), draws).
    """
    rng = np.random.default_rng(seed)
    clusters = scores[0].clusters
    count = clusters.max() + 1
    result = np.empty((len(scores), draws))
    for draw in range(draws):
        times = np.bincount(rng.integers(count, size=count), minlength=count)[clusters]
        for row, entry in enumerate(scores):
            result[row, draw] = np.mean(
                [m.average_precision(times) for of in entry.matches.values() for m in of]
            )
    return result


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides output at the file descriptor, as mmengine's bars keep the stream seen at import."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, 'w') as nothing, contextlib.redirect_stderr(io.StringIO()):
            os.dup2(nothing.fileno(), 1)
            yield
            sys.stdout.flush()
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _match(evaluation: NuScenesEval) -> dict[str, list[Matches]]:
    """Matches detections greedily by confidence, as the devkit's ``accumulate`` does."""
    tokens = evaluation.sample_tokens
    row = {token: i for i, token in enumerate(tokens)}
    result: dict[str, list[Matches]] = {}
    for name in evaluation.cfg.class_names:
        truth = {t: [b for b in evaluation.gt_boxes[t] if b.detection_name == name] for t in tokens}
        detections = [b for b in evaluation.pred_boxes.all if b.detection_name == name]
        # The devkit's order, ties included.
        order = sorted(range(len(detections)), key=lambda i: (detections[i].detection_score, i))[
            ::-1
        ]
        detections = [detections[i] for i in order]
        distance = [
            np.array([center_distance(t, box) for t in truth[box.sample_token]])
            for box in detections
        ]
        sample = np.array([row[box.sample_token] for box in detections], dtype=np.int64)
        positives = np.array([len(truth[t]) for t in tokens])
        result[name] = []
        for threshold in evaluation.cfg.dist_ths:
            free = {t: np.ones(len(truth[t]), dtype=bool) for t in tokens}
            hit = np.zeros(len(detections), dtype=bool)
            for i, (box, far) in enumerate(strict_zip(detections, distance)):
                far = np.where(free[box.sample_token], far, np.inf)
                if len(far) and far.min() < threshold:
                    hit[i] = True
                    free[box.sample_token][far.argmin()] = False
            result[name].append(Matches(hit, sample, positives))
    return result


def _clusters(nusc: NuScenes, tokens: list[str]) -> np.ndarray:
    """Numbers the groups of samples that are linked by the objects in them."""
    parent = {token: token for token in tokens}

    def root(token: str) -> str:
        while parent[token] != token:
            token = parent[token]
        return token

    shown = defaultdict(list)
    for token in tokens:
        for annotation in nusc.get('sample', token)['anns']:
            shown[nusc.get('sample_annotation', annotation)['instance_token']].append(token)
    for first, *others in shown.values():
        for other in others:
            parent[root(other)] = root(first)
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(root(token), len(numbers)) for token in tokens])
