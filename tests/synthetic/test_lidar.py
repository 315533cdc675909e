"""Returns: on surfaces, in the LiDAR's frame, from what is not hidden."""

import numpy as np
import pytest

from mmdet3d_quant.synthetic.lidar import RANGE_NOISE, scan
from mmdet3d_quant.synthetic.sensors import LIDAR_TRANSLATION, Pose
from mmdet3d_quant.synthetic.solid import MARGIN, make_solid
from mmdet3d_quant.synthetic.world import Thing

EGO = Pose(0, 0, 0)


def box(x, y, size=(2.0, 2.0, 2.0), yaw=0.0, reflectivity=0.3):
    solid = make_solid('debris', size, np.random.default_rng(0))
    solid.reflectivity[:] = reflectivity
    return Thing('debris', size, Pose(x, y, yaw), 0.0, solid, '')


def cast(*things, ego=EGO, rain=0.0):
    return scan(things, 0.0, ego, np.random.default_rng(0), rain)


def test_returns_lie_on_the_surface():
    result = cast(box(11, 0), ego=Pose(1, 0, 0))
    mine = result.points[result.thing == 0]
    assert len(mine) == result.hits[0] > 50
    face = 11 - 1 - 1 + MARGIN - LIDAR_TRANSLATION[0]  # ahead is +y of the LiDAR
    front = mine[mine[:, 2] < 2 - 3 * MARGIN - LIDAR_TRANSLATION[2]]
    np.testing.assert_allclose(front[:, 1], face, atol=3 * RANGE_NOISE)
    assert np.abs(mine[:, 0]).max() < 1 and mine[:, 0].max() - mine[:, 0].min() > 1.6


@pytest.mark.parametrize('yaw', [0.0, 2.0, -2.9])
def test_the_ego_car_may_point_anywhere(yaw):
    ego = Pose(5, -3, yaw)
    spot = ego @ Pose(0, 8, 0)  # to the left, which is -x of the LiDAR
    result = cast(box(spot.x, spot.y), ego=ego)
    mine = result.points[result.thing == 0]
    assert len(mine) > 50 and (mine[:, 0] < -6.5).all() and (mine[:, 0] > -9.5).all()


def test_ground():
    result = cast(box(200, 0))
    ground = result.points[(result.thing < 0) & (result.points[:, 3] > 6)]
    np.testing.assert_allclose(ground[:, 2], -LIDAR_TRANSLATION[2], atol=3 * RANGE_NOISE)
    assert result.hits[0] == result.possible[0] == 0


def test_the_hidden_give_nothing():
    result = cast(box(20, 0, (1.0, 1.0, 1.0)), box(8, 0, (6.0, 1.0, 3.0)))
    assert result.hits[0] == 0 and result.possible[0] > 10 and result.hits[1] > 200


def test_around_the_seam_of_the_scan():
    """Behind the LiDAR's -x axis the bearing jumps from pi to -pi."""
    result = cast(box(LIDAR_TRANSLATION[0], 8))
    mine = result.points[result.thing == 0]
    assert (mine[:, 1] > 0.5).any() and (mine[:, 1] < -0.5).any()


def test_intensity_and_loss():
    plate, dark = cast(box(10, 0, reflectivity=5.0)), cast(box(10, 0, reflectivity=0.003))
    assert (plate.points[plate.thing == 0][:, 3] == 255).mean() > 0.9
    assert dark.points[dark.thing == 0][:, 3].max() <= 3
    far = cast(box(40, 0, reflectivity=0.003))
    assert plate.hits[0] / plate.possible[0] > 0.9 and far.hits[0] / far.possible[0] < 0.8


def test_rain_adds_clutter_near_the_sensor():
    dry, wet = cast(box(30, 0)), cast(box(30, 0), rain=1.0)
    near = [(np.linalg.norm(r.points[:, :3], axis=1) < 3).sum() for r in (dry, wet)]
    assert near[1] > 100 > near[0] > 0
    assert len(wet.points) < len(dry.points)


def test_hits_count_the_returns():
    things = [box(8, 2), box(14, -3), box(-9, 1)]
    result = cast(*things, rain=1.0)
    counted = np.bincount(result.thing[result.thing >= 0], minlength=3)
    np.testing.assert_array_equal(result.hits, counted)
