"""mmdet3d reads the set as it stands, and its metric knows right from wrong."""

import pickle

import numpy as np
import pytest
import torch
from mmdet3d.evaluation import NuScenesMetric
from mmdet3d.registry import DATASETS
from mmdet3d.structures import LiDARInstance3DBoxes
from mmdet3d.utils import register_all_modules

from mmdet3d_quant.data.nuscenes import check
from mmdet3d_quant.synthetic.generate import make_synthetic_nuscenes
from mmdet3d_quant.synthetic.kinds import CLASSES
from mmdet3d_quant.synthetic.sensors import CAMERAS

VAL = 'nuscenes_infos_val.pkl'


def dataset(root, ann_file, **options):
    register_all_modules(init_default_scope=True)
    prefix = {c.name: f'samples/{c.name}' for c in CAMERAS}
    return DATASETS.build(
        dict(
            type='NuScenesDataset',
            data_root=str(root),
            ann_file=ann_file,
            data_prefix=dict(prefix, pts='samples/LIDAR_TOP', sweeps='sweeps/LIDAR_TOP'),
            metainfo=dict(version='v1.0-mini'),
            modality=dict(use_lidar=True, use_camera=True),
            **options,
        )
    )


def score(root, change=None):
    """mAP and NDS of the annotations taken for predictions, after ``change(labels)``."""
    data = dataset(root, VAL)
    metric = NuScenesMetric(str(root), str(root / VAL), metric='bbox')
    metric.dataset_meta = data.metainfo
    for k in range(len(data)):
        truth = data.get_data_info(k)['ann_info']
        labels = torch.as_tensor(truth['gt_labels_3d'])
        boxes = truth['gt_bboxes_3d']
        assert isinstance(boxes, LiDARInstance3DBoxes)
        found = dict(
            bboxes_3d=boxes,
            scores_3d=torch.ones(len(labels)),
            labels_3d=change(labels) if change else labels,
        )
        metric.process({}, [dict(pred_instances_3d=found, pred_instances={}, sample_idx=k)])
    results = metric.evaluate(len(data))
    return [results[f'NuScenes metric/pred_instances_3d_NuScenes/{n}'] for n in ('mAP', 'NDS')]


def test_data_set_reads_it(tiny_nuscenes):
    assert check(tiny_nuscenes) == 'v1.0-mini'
    sweeps = dict(
        type='LoadPointsFromMultiSweeps', sweeps_num=3, load_dim=5, use_dim=5, test_mode=True
    )
    pipeline = [
        dict(type='LoadPointsFromFile', coord_type='LIDAR', load_dim=5, use_dim=5),
        sweeps,
        dict(type='LoadMultiViewImageFromFiles', num_views=6),
    ]
    data = dataset(
        tiny_nuscenes, 'nuscenes_infos_train.pkl', pipeline=pipeline, filter_empty_gt=False
    )
    frame = data[0]
    assert len(data) == 2 and len(frame['img']) == 6
    assert frame['img'][0].shape == (396, 704, 3)
    times = frame['points'].tensor[:, 4].unique()
    np.testing.assert_allclose(times, [0, 0.1, 0.2, 0.3], atol=1e-3)
    info = data.get_data_info(0)
    moving = np.linalg.norm(info['ann_info']['gt_bboxes_3d'].tensor[:, 7:], axis=1)
    assert np.isfinite(moving).all() and moving.max() > 0.5


@pytest.mark.slow
def test_metric(tmp_path):
    root = make_synthetic_nuscenes(tmp_path / 'data', ['scene-0103', 'scene-0916'], samples=10)
    assert not (root / 'nuscenes_infos_train.pkl').exists()
    assert check(root, infos=[VAL]) == 'v1.0-mini'
    data = dataset(root, VAL)
    infos = [data.get_data_info(k)['ann_info'] for k in range(len(data))]
    assert len(set(np.concatenate([i['gt_labels_3d'] for i in infos]))) == len(CLASSES)
    mean_ap, nds = score(root)
    assert mean_ap > 0.99 and nds > 0.95  # attributes are guessed from speeds
    mean_ap, _ = score(root, lambda x: (x + 3) % 10)
    assert mean_ap < 0.05


@pytest.mark.slow
def test_objects_to_paste(tmp_path):
    root = make_synthetic_nuscenes(
        tmp_path / 'data', ['scene-0061'], samples=2, workers=1, gt_database=True
    )
    objects = pickle.loads((root / 'nuscenes_dbinfos_train.pkl').read_bytes())
    assert set(objects) == set(CLASSES)
    car = objects['car'][0]
    points = np.fromfile(root / car['path'], np.float32).reshape(-1, 5)
    assert len(points) == car['num_points_in_gt'] > 0
