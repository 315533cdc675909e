"""Our BEVFusion against the public project: same weights, same real frame, same results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmdet3d_quant.data.samples import FRAME, real_frame

PUBLIC = os.environ.get('MMDET3D_BEVFUSION_PROJECT')
EXACT = ('in.', 'geometry', 'img_backbone')

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
    """Figures of ``compare.py``, in a process of its own: both families share their names."""
    out = tmp_path_factory.mktemp('reference') / 'figures.json'
    script = Path(__file__).with_name('compare.py')
    subprocess.run([sys.executable, str(script), '--out', str(out)], check=True)
    return json.loads(out.read_text())


def test_inputs_and_geometry_are_bit_equal(report):
    exact = {name: f for name, f in report['figures'].items() if name.startswith(EXACT)}
    assert {'in.img', 'in.depth_map', 'in.voxel.0', 'in.voxel.1', 'geometry'} <= set(exact)
    assert [name for name, f in exact.items() if not f['equal']] == []


def test_every_part_agrees(report):
    assert report['missing'] == []
    parts = {name.split('.')[0] for name in report['figures']}
    assert {'view_transform', 'pts_middle_encoder', 'fusion_layer', 'bbox_head'} <= parts
    off = {n: f for n, f in report['figures'].items() if max(f['l2'], f['max']) > 1e-4}
    assert off == {}


@pytest.mark.parametrize('what', ['proposals', 'boxes', 'end_to_end'])
def test_the_same_boxes_come_out(report, what):
    """As a set; of two nearly equal peaks either may make the 200."""
    assert report['found'][what] >= 0.98


def test_quant_types_work_in_the_public_detector(tmp_path):
    """The INT8 config with the public family registered first: calibrate, export, verify."""
    code = f"""
import sys
from pathlib import Path
from tests.reference.compare import import_public
import_public(Path({PUBLIC!r}).expanduser())
import pytest
assert pytest.main(['tests/export/test_suite.py', '-k', 'shapes']) == 0
from tests.export.detectors import files_with_swin, small_detector
folder = Path({str(tmp_path)!r})
assert len(files_with_swin(small_detector(folder), folder)) == 4  # its head has no file
from mmdet3d.registry import MODELS
assert MODELS.get('BEVFusion').__module__.startswith('projects.BEVFusion')
"""
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parents[2])
