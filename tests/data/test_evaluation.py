"""Scores against mmdet3d's metric and the devkit, and what the bootstrap says of luck."""

import contextlib
import io

import numpy as np
import pytest
import torch
from mmdet3d.evaluation.metrics import NuScenesMetric
from mmdet3d.registry import DATASETS
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.data.evaluation import Matches, Scorer, bootstrap
from tests.small import ROOT

CONFIG = ROOT / 'configs/bevfusion_tiny/bevfusion_tiny_lidar_synthetic.py'


@pytest.fixture(scope='module')
def val(tiny_nuscenes):
    """Evaluator config and validation data set."""
    init_default_scope('mmdet3d')
    cfg = Config.fromfile(CONFIG)
    cfg.val_dataloader.dataset.data_root = f'{tiny_nuscenes}/'
    evaluator = dict(
        data_root=f'{tiny_nuscenes}/', ann_file=f'{tiny_nuscenes}/nuscenes_infos_val.pkl'
    )
    return evaluator, DATASETS.build(cfg.val_dataloader.dataset)


def detections(dataset, noise, seed=0):
    """Ground truth with noise on the position, shuffled scores and some boxes too many."""
    torch.manual_seed(seed)
    results = []
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        boxes = info['eval_ann_info']['gt_bboxes_3d'].tensor.clone()
        labels = torch.as_tensor(info['eval_ann_info']['gt_labels_3d'])
        boxes, labels = boxes[labels >= 0], labels[labels >= 0]
        boxes[:, :2] += noise * torch.randn(len(boxes), 2)
        if noise:
            extra = boxes[:5].clone()
            extra[:, 0] += 7
            boxes, labels = torch.cat([boxes, extra]), torch.cat([labels, labels[:5]])
        found = InstanceData(
            bboxes_3d=LiDARInstance3DBoxes(boxes, box_dim=9),
            scores_3d=torch.rand(len(boxes)),
            labels_3d=labels,
        )
        results.append(dict(sample_idx=info['sample_idx'], pred_instances_3d=found))
    return results


def stock(evaluator, dataset, results):
    metric = NuScenesMetric(**evaluator)
    metric.dataset_meta = dataset.metainfo
    samples = [
        dict(r, pred_instances={}, pred_instances_3d=dict(r['pred_instances_3d'].items()))
        for r in results
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        metric.process({}, samples)
        values = metric.evaluate(len(samples))
    return {k.rsplit('/', 1)[1]: v for k, v in values.items()}


@pytest.mark.parametrize('noise', [0.0, 0.6, 2.0])
def test_scores_are_those_of_mmdet3ds_metric(val, noise):
    evaluator, dataset = val
    results = detections(dataset, noise)
    scores = Scorer(evaluator, dataset.metainfo).score(results)
    wanted = stock(evaluator, dataset, results)
    assert scores.mAP == pytest.approx(wanted['mAP'], abs=1e-9)
    assert scores.NDS == pytest.approx(wanted['NDS'], abs=1e-9)
    assert scores.errors['vel_err'] == pytest.approx(wanted['mAVE'], abs=1e-4, nan_ok=True)
    for name, matches in scores.matches.items():
        for threshold, match in strict_zip(('0.5', '1.0', '2.0', '4.0'), matches):
            ap = wanted[f'{name}_AP_dist_{threshold}']
            assert match.average_precision() == pytest.approx(ap, abs=1e-4)
    # The two frames show the same objects: they stand or fall together.
    assert scores.clusters.tolist() == [0, 0]


def matches(hit, sample, positives):
    return Matches(np.array(hit), np.array(sample), np.array(positives))


def test_a_sample_counted_twice_counts_twice():
    once = matches([True, False, True, True], [0, 1, 2, 0], [3, 1, 2])
    twice = once.average_precision(np.array([2, 1, 0]))
    # Detections of sample 0 appear twice, those of sample 2 not at all.
    by_hand = matches([True, True, False, True, True], [0, 0, 1, 0, 0], [6, 1, 0])
    assert twice == pytest.approx(by_hand.average_precision(), abs=0.02)
    assert twice != pytest.approx(once.average_precision(), abs=0.02)


def test_bootstrap_is_paired_and_knows_luck(val):
    evaluator, dataset = val
    base = Scorer(evaluator, dataset.metainfo).score(detections(dataset, 0.3))
    rng = np.random.default_rng(0)

    def scores(hit_rate):
        found = matches(rng.random(400) < hit_rate, np.arange(400) // 4, [4] * 100)
        fields = dict(matches={'car': [found]}, clusters=np.arange(100) // 2)
        return type(base)(**{**base.__dict__, **fields})

    good, same, bad = scores(0.9), scores(0.9), scores(0.6)
    luck = bootstrap([good, good, same, bad], draws=300)
    assert luck.shape == (4, 300) and (luck[0] == luck[1]).all()
    assert 0 < luck[0].std() < 0.05
    low, high = np.percentile(luck[2] - luck[0], [2.5, 97.5])
    assert low < 0 < high
    assert np.percentile(luck[3] - luck[0], 97.5) < 0
    assert (bootstrap([good], draws=5, seed=1) == bootstrap([good], draws=5, seed=1)).all()
