"""What nuscenes-devkit reads agrees with the world that was drawn."""

import numpy as np
import pytest
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import points_in_box

from mmdet3d_quant.synthetic.kinds import CLASSES
from mmdet3d_quant.synthetic.layout import MOVING
from mmdet3d_quant.synthetic.lidar import scan
from mmdet3d_quant.synthetic.light import make_light
from mmdet3d_quant.synthetic.record import Settings, generators, make_layout
from mmdet3d_quant.synthetic.tables import token
from mmdet3d_quant.synthetic.world import KEYFRAME_INTERVAL

SCENE = 'scene-0103'


def layout():
    """The labelled things of the scene's only block, by instance token."""
    block = make_layout(Settings(), SCENE, 0)
    return {
        token('instance', SCENE, 0, k): thing
        for k, thing in enumerate(block.things)
        if thing.labelled
    }, block


def annotations(devkit, key):
    sample = devkit.get('sample', token('sample', SCENE, key))
    return [devkit.get('sample_annotation', t) for t in sample['anns']]


def test_every_table_has_rows(devkit):
    assert len(devkit.table_names) == 13
    for name in devkit.table_names:
        assert getattr(devkit, name), name


def test_all_classes_appear():
    things, _ = layout()
    assert {t.kind for t in things.values()} == set(CLASSES)


def test_places_and_velocities(devkit):
    things, block = layout()
    for key in (0, 1):
        rows = annotations(devkit, key)
        assert len(rows) == len(things)
        for row in rows:
            thing = things[row['instance_token']]
            pose = block.anchor @ thing.at(key * KEYFRAME_INTERVAL)
            np.testing.assert_allclose(row['translation'][:2], [pose.x, pose.y], atol=1e-9)
            velocity = devkit.box_velocity(row['token'])
            expected = thing.speed * np.array([np.cos(pose.yaw), np.sin(pose.yaw), 0])
            # Timestamps of the devkit are float64 seconds since 1970: 1e-7 s of 0.5 s.
            np.testing.assert_allclose(velocity, expected, atol=1e-4)


def test_attributes_agree_with_speeds(devkit):
    for row in annotations(devkit, 0):
        speed = np.linalg.norm(devkit.box_velocity(row['token']))
        names = [devkit.get('attribute', t)['name'] for t in row['attribute_tokens']]
        for name in names:
            if name.endswith('.moving'):
                assert speed > MOVING
            elif name != 'cycle.with_rider':
                assert speed < MOVING
        static = row['category_name'].startswith('movable_object')
        assert len(names) == (0 if static else 1)


def test_chains(devkit):
    settings = Settings()
    sample = devkit.get('sample', token('sample', SCENE, 0))
    assert sample['prev'] == '' and devkit.get('sample', sample['next'])['next'] == ''
    for key in (0, 1):
        data = devkit.get('sample', token('sample', SCENE, key))['data']
        row = devkit.get('sample_data', data['LIDAR_TOP'])
        start = row['timestamp']
        for k in range(1, settings.sweeps + 1):
            before = devkit.get('sample_data', row['prev'])
            assert before['next'] == row['token'] and not before['is_key_frame']
            row = before
            assert start - row['timestamp'] == round(k * settings.sweep_interval * 1e6)
        assert (row['prev'] == '') == (key == 0)


def test_returns_from_a_thing_lie_in_its_box(devkit):
    """Casts the first key frame anew; the file holds the same points in the same order."""
    _, block = layout()
    _, light_rng, rng, _ = generators(Settings(), SCENE, 0)
    rain = make_light(light_rng).rain
    for k in range(Settings().sweeps, -1, -1):
        time = -k * Settings().sweep_interval
        result = scan(block.things, time, block.ego(time), rng, rain)
    data = devkit.get('sample', token('sample', SCENE, 0))['data']['LIDAR_TOP']
    path, boxes, _ = devkit.get_sample_data(data)
    cloud = LidarPointCloud.from_file(path)
    np.testing.assert_array_equal(cloud.points.T, result.points[:, :4])
    rows = {row['instance_token']: row for row in annotations(devkit, 0)}
    by_token = {b.token: b for b in boxes}
    some = 0
    for k, thing in enumerate(block.things):
        if thing.labelled:
            row = rows[token('instance', SCENE, 0, k)]
            mine = cloud.points[:3, result.thing == k]
            assert mine.shape[1] == row['num_lidar_pts']
            assert points_in_box(by_token[row['token']], mine).all(), thing.kind
            some += mine.shape[1]
    assert some > 500


@pytest.mark.parametrize('table', ['ego_pose', 'sample_annotation'])
def test_rotations_are_of_unit_length(devkit, table):
    for row in getattr(devkit, table):
        assert np.linalg.norm(row['rotation']) == pytest.approx(1)
