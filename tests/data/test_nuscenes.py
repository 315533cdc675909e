"""A damaged data set is told apart from a whole one, with the file and the remedy."""

import json
import os
import pickle
import shutil

import pytest

from mmdet3d_quant.data.nuscenes import DatasetError, check

TABLES = 'v1.0-mini'


@pytest.fixture
def copy(tiny_nuscenes, tmp_path):
    """The tiny data set, to be damaged: recordings are links, tables and infos copies."""
    root = tmp_path / 'nuscenes'
    for folder in ('samples', 'sweeps'):
        shutil.copytree(tiny_nuscenes / folder, root / folder, copy_function=os.link)
    shutil.copytree(tiny_nuscenes / TABLES, root / TABLES)
    for file in tiny_nuscenes.glob('*.pkl'):
        shutil.copy(file, root)
    return root


def edit(root, table, change):
    path = root / TABLES / f'{table}.json'
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


def edit_infos(root, change):
    path = root / 'nuscenes_infos_val.pkl'
    infos = pickle.loads(path.read_bytes())
    change(infos)
    path.write_bytes(pickle.dumps(infos))


def test_whole(copy):
    assert check(copy) == TABLES
    assert check(copy, version=TABLES, infos=[]) == TABLES


def cut(root):
    path = root / TABLES / 'sample.json'
    path.write_text(path.read_text()[:-40])


DAMAGES = {
    'table cut off': (cut, r'sample\.json is damaged'),
    'table missing': (lambda r: (r / TABLES / 'log.json').unlink(), r'log\.json is missing'),
    'table empty': (lambda r: (r / TABLES / 'scene.json').write_text('[]'), 'is empty'),
    'table of another kind': (lambda r: (r / TABLES / 'map.json').write_text('{}'), 'no list'),
    'token twice': (lambda r: edit(r, 'log', lambda t: t.append(t[0])), 'same token twice'),
    'reference lost': (
        lambda r: edit(r, 'sample_annotation', lambda t: t[3].update(instance_token='x')),
        r"instance_token 'x' of .* is not in instance\.json",
    ),
    'field lost': (lambda r: edit(r, 'sample', lambda t: t[0].pop('next')), 'has no next'),
    'empty scene': (
        lambda r: edit(r, 'scene', lambda t: t[0].update(nbr_samples=0)),
        'scene-0061 has no samples',
    ),
    'chain of a scene cut': (
        lambda r: edit(r, 'sample', lambda t: t[0].update(next='')),
        'scene-0061 says 2 samples, its chain has 1',
    ),
    'camera lost': (
        lambda r: edit(r, 'sample_data', lambda t: t[-1].update(is_key_frame=False)),
        'has no CAM_BACK_RIGHT',
    ),
    'image missing': (
        lambda r: next((r / 'samples/CAM_BACK').iterdir()).unlink(),
        r'\.jpg, named in .*, is missing',
    ),
    'sweep missing': (
        lambda r: [f.unlink() for f in (r / 'sweeps/LIDAR_TOP').iterdir()],
        r'sweeps/LIDAR_TOP/.*\.pcd\.bin, named in .*, is missing',
    ),
    'infos missing': (
        lambda r: (r / 'nuscenes_infos_val.pkl').unlink(),
        r'nuscenes_infos_val\.pkl is missing; run',
    ),
    'infos cut off': (
        lambda r: (r / 'nuscenes_infos_val.pkl').write_bytes(b'\x80\x04'),
        'is damaged',
    ),
    'infos of version 1': (
        lambda r: (r / 'nuscenes_infos_val.pkl').write_bytes(pickle.dumps(dict(infos=[]))),
        'version 2',
    ),
    'infos of another set': (
        lambda r: edit_infos(r, lambda i: i['metainfo'].update(version='v1.0-trainval')),
        'is of v1.0-trainval, the tables of v1.0-mini',
    ),
    'infos empty': (lambda r: edit_infos(r, lambda i: i['data_list'].clear()), 'no frames'),
    'infos of other frames': (
        lambda r: edit_infos(r, lambda i: i['data_list'][0].update(token='x')),
        r'x is not in sample\.json',
    ),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damage(copy, damage):
    harm, message = DAMAGES[damage]
    harm(copy)
    with pytest.raises(DatasetError, match=message) as err:
        check(copy)
    assert str(copy) in str(err.value)


def test_folders(copy, tmp_path):
    with pytest.raises(DatasetError, match='does not exist; get nuScenes, or make'):
        check(tmp_path / 'nowhere')
    with pytest.raises(DatasetError, match='v1.0-trainval is not among .* found v1.0-mini'):
        check(copy, version='v1.0-trainval')
    with pytest.raises(DatasetError, match='no folder v1.0'):
        check(tmp_path)
