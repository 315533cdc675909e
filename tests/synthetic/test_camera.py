"""Pictures: things are where the calibration says, and nearer ones hide those behind."""

import cv2
import numpy as np
import pytest
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import view_points
from pyquaternion import Quaternion

from mmdet3d_quant.synthetic.camera import Scene
from mmdet3d_quant.synthetic.light import make_light
from mmdet3d_quant.synthetic.order import paint_order
from mmdet3d_quant.synthetic.sensors import CAMERAS, Pose
from mmdet3d_quant.synthetic.solid import MARGIN, make_solid
from mmdet3d_quant.synthetic.world import Block, Thing

WIDTH = 704


def cuboid(x, y, yaw, size, colour):
    """A box of one colour that gives off light."""
    solid = make_solid('debris', size, np.random.default_rng(0))
    solid.albedo[:] = 0
    solid.glow[:] = 1 + colour
    return Thing('debris', size, Pose(x, y, yaw), 0.0, solid, '')


def pictures(things, ego=None):
    """Six pictures of glowing red (0) and green (1) boxes in the dark."""
    light = make_light(np.random.default_rng(0))
    light.direct, light.ambient, light.sky = np.zeros(3), np.zeros(3), np.zeros((2, 3))
    light.head, light.haze, light.exposure = 0.0, 1e9, np.ones(6)
    light.glow = np.zeros((6, 3))
    light.glow[1], light.glow[2] = [1, 0, 0], [0, 1, 0]
    block = Block(Pose(0, 0, 0), 0.0, 0.0, 0.0, things)
    if ego is not None:
        block.ego = lambda time: ego
    return Scene(block, light, np.random.default_rng(0)).frame(0.0, WIDTH)


def outline(thing, camera, ego):
    """Pixels of a box's corners, (2, 8), by the devkit's way from global to camera."""
    width, length, height = (s - 2 * MARGIN for s in thing.size)
    box = Box(
        [thing.pose.x, thing.pose.y, height / 2],
        [width, length, height],
        thing.pose.rotation,
    )
    box.translate(-np.array([ego.x, ego.y, 0]))
    box.rotate(ego.rotation.inverse)
    box.translate(-np.array(camera.translation))
    box.rotate(Quaternion(camera.rotation).inverse)
    if box.corners()[2].min() < 0.5:
        return None
    return view_points(box.corners(), camera.intrinsics(WIDTH), normalize=True)[:2]


@pytest.mark.parametrize('camera', CAMERAS, ids=lambda c: c.name)
def test_a_box_is_where_the_calibration_says(camera):
    ego = Pose(3.0, -2.0, 0.7)
    ahead = ego.yaw + np.radians(camera.yaw) + 0.1
    thing = cuboid(ego.x + 15 * np.cos(ahead), ego.y + 15 * np.sin(ahead), 0.3, (1.5, 3, 2), 0)
    image = pictures([thing], ego)[CAMERAS.index(camera)]
    rows, columns = np.nonzero(image[..., 2] > 128)
    corners = outline(thing, camera, ego)
    np.testing.assert_allclose(columns.min(), corners[0].min(), atol=1.5)
    np.testing.assert_allclose(columns.max(), corners[0].max(), atol=1.5)
    np.testing.assert_allclose(rows.min(), corners[1].min(), atol=1.5)
    np.testing.assert_allclose(rows.max(), corners[1].max(), atol=1.5)


def test_the_nearer_hides_the_farther():
    """A long box whose middle is farther away than that of the small one behind its near end."""
    long = cuboid(14, 0, 0.0, (1.0, 12, 3), 0)
    small = cuboid(10, 2.0, 0.0, (1.0, 1.0, 1.0), 1)
    image = pictures([long, small])[0]
    hull = cv2.convexHull(outline(small, CAMERAS[0], Pose(0, 0, 0)).T.astype(np.float32))
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.fillConvexPoly(mask, hull.astype(np.int32), 1)
    mask = cv2.erode(mask, np.ones((5, 5)))
    assert mask.sum() > 50 and (image[mask == 1][:, 1] > 200).all()
    behind = cuboid(24, 0.4, 0.0, (1.0, 1.0, 1.0), 1)
    assert not (pictures([long, behind])[0][..., 1] > 128).any()


def test_a_box_beside_the_camera_is_cut_at_it():
    """Part of it lies behind the camera."""
    image = pictures([cuboid(2, 2.5, 0.0, (1.0, 12, 3), 0)])[0]
    assert (image[..., 2] > 128).mean() > 0.02 and image[:, WIDTH // 2 :, 2].max() < 50


def test_paint_order():
    before = np.array([[0, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=bool)
    assert paint_order(before, np.array([1.0, 5.0, 3.0])) == [2, 0, 1]
    circle = np.array([[0, 1], [1, 0]], dtype=bool)
    assert paint_order(circle, np.array([1.0, 2.0])) == [1, 0]
