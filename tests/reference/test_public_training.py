"""Our training step against the public project's: same frame, same weights, same gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmdet3d_quant.data.samples import FRAME, real_frame

PUBLIC = os.environ.get('MMDET3D_BEVFUSION_PROJECT')

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PUBLIC is None, reason='MMDET3D_BEVFUSION_PROJECT (an mmdetection3d repository) not set'
    ),
    pytest.mark.frame,
    pytest.mark.skipif(real_frame() is None, reason=f'{FRAME} names no nuScenes frame'),
]


@pytest.fixture(scope='module')
def report(tmp_path_factory) -> dict:
    """Figures of ``compare_training.py``, in a process of its own."""
    out = tmp_path_factory.mktemp('reference') / 'figures.json'
    script = Path(__file__).with_name('compare_training.py')
    subprocess.run([sys.executable, str(script), '--out', str(out)], check=True)
    return json.loads(out.read_text())


def test_the_same_random_numbers_augment_the_same_way(report):
    assert report['boxes'] > 20 and '0.lidar_aug_matrix' in report['inputs']
    off = {n: f for n, f in report['inputs'].items() if f['max'] > 1e-6}
    assert off == {}


def test_losses_agree(report):
    assert {'loss_heatmap', 'layer_-1_loss_cls', 'layer_-1_loss_bbox', 'matched_ious'} == set(
        report['losses']
    )
    for ours, public in report['losses'].values():
        assert ours == pytest.approx(public, rel=1e-5)


def test_targets_agree_where_boxes_overlap(report):
    assert report['overlap'] > 0.2
    assert {n: f for n, f in report['targets'].items() if f['l2'] > 1e-5} == {}


def test_gradients_agree(report):
    assert report['missing'] == [] and len(report['grads']) > 200
    # A bias in front of a batch norm has no gradient but rounding.
    rest = {n: f for n, f in report['grads'].items() if f['norm'] > 1e-9}
    assert len(rest) > 0.95 * len(report['grads'])
    assert {n: f for n, f in rest.items() if f['l2'] > 1e-5} == {}
