"""tools/check_scn.py: what it says of good, odd and bad files."""

import json
import sys

import numpy as np
import onnx
import pytest
import torch

from mmdet3d_quant.export.sparse import ScnError, export_lidar
from tests.export.sparse.encoders import build, calibrated
from tests.frame import ROOT

sys.path.insert(0, str(ROOT / 'tools'))
import check_scn  # noqa: E402

from mmdet3d_quant.core.compat import strict_zip

GRID = ('--range', -6, -5, -3, 6, 5, 2.25, '--voxel-size', 0.25, 0.25, 0.25)


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('scn') / 'lidar.onnx'
    export_lidar(calibrated('bevfusion'), path)
    return path


@pytest.fixture(scope='module')
def points(tmp_path_factory):
    """Two points in one cell, one outside, and others."""
    path = tmp_path_factory.mktemp('points') / 'points.bin'
    rng = np.random.default_rng(0)
    found = rng.uniform([-6, -5, -3, 0, 0], [6, 5, 2.2, 1, 0.5], (500, 5))
    found[:3, :3] = [[1.01, 1.01, 1.01], [1.02, 1.02, 1.02], [9, 9, 9]]
    found.astype('f4').tofile(path)
    return path


def run(*args):
    return check_scn.main([str(a) for a in args])


def test_layers_and_map(file, capsys):
    assert run(file) == 0
    told = capsys.readouterr().out
    assert 'xyz, 48 x 40 x 21 cells' in told and 'fp16 -> int8' in told and 'conv13' in told
    assert '(1, 32, 12, 10)' in told and 'unequal' not in told


def test_points_give_the_map_of_the_encoder(points, tmp_path):
    model = build('bevfusion')
    out = tmp_path / 'map.npy'
    maps = []
    for order in ('xyz', 'zyx'):
        export_lidar(model, tmp_path / 'float.onnx', order)
        assert run(tmp_path / 'float.onnx', '--points', points, *GRID, '--save', out) == 0
        maps.append(torch.from_numpy(np.load(out)))
    raw = np.fromfile(points, 'f4').reshape(-1, 5)
    cells = {}
    for point in raw:
        cell = tuple(np.floor((point[:3] - [-6, -5, -3]) / 0.25).astype(int))
        if all(0 <= c < n for c, n in strict_zip(cell, (48, 40, 21))):
            cells.setdefault(cell, []).append(point)
    assert len(cells[28, 24, 16]) >= 2
    feats = torch.tensor(np.stack([np.mean(found, 0) for found in cells.values()]))
    coors = torch.tensor([(0, *cell) for cell in cells])
    with torch.no_grad():
        wanted = model(feats, coors, 1)
    for found in maps:
        torch.testing.assert_close(found, wanted, atol=5e-3, rtol=5e-3)


def test_where_the_map_goes_is_checked_before_anything_runs(file, tmp_path, capsys):
    with pytest.raises(OSError, match='is a folder'):
        run(file, '--save', tmp_path)
    assert capsys.readouterr().out == ''
    assert run(file, '--save', tmp_path / 'map') == 0  # under the name that was given
    assert [p.name for p in tmp_path.iterdir()] == ['map'] and np.load(tmp_path / 'map').ndim == 4


def test_json_and_unequal_ranges(file, tmp_path, capsys):
    model = onnx.load(file)
    next(a for a in model.graph.node[3].attribute if a.name == 'input1_dynamic_range').f = 1.25
    onnx.save(model, tmp_path / 'odd.onnx')
    assert run(tmp_path / 'odd.onnx', '--json') == 0
    told = capsys.readouterr().out
    listed, _ = json.JSONDecoder().raw_decode(told)
    assert [layer['name'] for layer in listed[:4]] == ['conv0', 'conv1', 'conv2', 'add0']
    assert listed[0]['kernel'] == [3, 3, 3] and 'weight' not in listed[0]
    assert 'tensor 1 is read with unequal ranges' in told and '1.25' in told


def test_values_that_leave_fp16(points, tmp_path):
    model = build('bevfusion')
    norm = model.conv_out[1]
    norm.running_mean.data.zero_()
    norm.weight.data[:], norm.bias.data[:] = 2e4, 6e4
    export_lidar(model, tmp_path / 'hot.onnx')
    assert run(tmp_path / 'hot.onnx', '--points', points, *GRID) == 1


def test_more_voxels_than_the_file_has_room_for(file, tmp_path, capsys):
    model = onnx.load(file)
    found = []
    for bound in (10**6, 100):
        next(a for a in model.graph.node[1].attribute if a.name == 'output_bound').i = bound
        onnx.save(model, tmp_path / 'narrow.onnx')
        found.append((run(tmp_path / 'narrow.onnx'), capsys.readouterr().out))
    assert [code for code, _ in found] == [0, 1]
    name = model.graph.node[1].name
    assert f'{name} (' not in found[0][1] and 'Fullest: ' in found[0][1]
    assert f'{name} (' in found[1][1] and 'a larger output_bound' in found[1][1].replace('\n', ' ')


def test_bad_points(file, tmp_path):
    (tmp_path / 'odd.bin').write_bytes(b'1234' * 7)
    with pytest.raises(ScnError, match='7 numbers, no multiple of 5'):
        run(file, '--points', tmp_path / 'odd.bin')
    np.full((3, 5), 99, 'f4').tofile(tmp_path / 'far.bin')
    with pytest.raises(ScnError, match='no point inside'):
        run(file, '--points', tmp_path / 'far.bin')
