"""Boxes in the pictures: where other code says they are, and of the frame that is asked for."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from mmdet3d.registry import DATASETS
from mmdet3d.structures import LiDARInstance3DBoxes, points_cam2img
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from nuscenes.utils.geometry_utils import BoxVisibility, view_points

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.report.pictures import (
    TRUTH,
    Frame,
    draw_frame,
    line_of,
    load_frame,
    project_edges,
)
from tests.small import ROOT

CONFIG = ROOT / 'configs/bevfusion_tiny/bevfusion_tiny_lidar_synthetic.py'
CAM2IMG = np.array([[500.0, 0, 350], [0, 480, 200], [0, 0, 1]])
#: LiDAR axes (right, ahead, up) to those of a camera that looks ahead (right, down, ahead).
AHEAD = np.array([[1.0, 0, 0, 0.1], [0, 0, -1, 0.3], [0, 1, 0, -0.5], [0, 0, 0, 1]])


@pytest.fixture(scope='module')
def dataset(tiny_nuscenes):
    init_default_scope('mmdet3d')
    settings = Config.fromfile(CONFIG).val_dataloader.dataset
    settings.update(data_root=f'{tiny_nuscenes}/', modality=dict(use_lidar=True, use_camera=True))
    settings.pipeline = []
    return DATASETS.build(settings)


def lidar2img():
    full = np.eye(4)
    full[:3, :3] = CAM2IMG
    return full @ AHEAD


def box(x, y, yaw=0.0, size=(4.0, 2.0, 1.5)):
    return LiDARInstance3DBoxes(torch.tensor([[x, y, -1.0, *size, yaw]]))


def corners(*boxes):
    return LiDARInstance3DBoxes.cat(boxes).corners.numpy()


def result(index, *rows):
    """Detections: x, score."""
    boxes = torch.tensor([[x, 0.0, 0.0, 4, 2, 1.5, 0] for x, _ in rows]).reshape(-1, 7)
    found = InstanceData(
        bboxes_3d=LiDARInstance3DBoxes(boxes),
        scores_3d=torch.tensor([score for _, score in rows]),
        labels_3d=torch.zeros(len(rows), dtype=torch.long),
    )
    return dict(sample_idx=index, pred_instances_3d=found)


def test_edges_are_those_of_a_cuboid_projected_as_mmdet3d_does():
    made = corners(box(2, 12, 0.7), box(-3, 20, -2))
    lines = project_edges(made, lidar2img())
    in_camera = made.reshape(-1, 3) @ AHEAD[:3, :3].T + AHEAD[:3, 3]
    pixels = points_cam2img(in_camera, CAM2IMG).reshape(2, 8, 2)
    wanted = set()
    for points, solid in strict_zip(pixels, made):
        for i, j in itertools.combinations(range(8), 2):
            # No diagonal is as long as a side.
            if np.isclose(np.linalg.norm(solid[i] - solid[j]), (4.0, 2.0, 1.5), rtol=1e-3).any():
                wanted.add(line(points[i], points[j]))
    assert {line(*ends) for ends in lines} == wanted and len(wanted) == 24


def line(a, b):
    return tuple(sorted(tuple(np.round(p, 2) + 0.0) for p in (a, b)))


def test_an_edge_that_passes_the_camera_is_cut_there():
    made = corners(box(1.0, 0.0, np.pi / 2, size=(10.0, 1.0, 1.0)))  # from 5 m behind to 5 m ahead
    lines = project_edges(made, lidar2img())
    assert len(lines) == 8 and np.isfinite(lines).all()  # but for the back face
    start = made[0][np.argsort(made[0][:, 1])[-4:]]  # the front face, 5 m ahead
    # Points along each long edge, from the front to 0.3 m before the camera, by brute force.
    for corner in start:
        at = np.linspace(corner[1], 0.8 + 1e-6, 2000)
        way = np.stack([np.full_like(at, corner[0]), at, np.full_like(at, corner[2])], axis=1)
        in_camera = way @ AHEAD[:3, :3].T + AHEAD[:3, 3]
        near, far = (points_cam2img(in_camera[[i]], CAM2IMG)[0] for i in (-1, 0))
        gap = np.abs(lines - np.stack([near, far])).max(axis=(1, 2))
        gap = np.minimum(gap, np.abs(lines - np.stack([far, near])).max(axis=(1, 2)))
        assert gap.min() < 0.1


def test_behind_the_camera_there_is_nothing():
    assert project_edges(corners(box(0, -10)), lidar2img()).shape == (0, 2, 2)
    assert project_edges(np.zeros((0, 8, 3)), lidar2img()).shape == (0, 2, 2)


def test_labelled_boxes_lie_where_the_devkit_projects_them(dataset, devkit):
    """The devkit goes from the global frame through poses and mounts of each camera."""
    compared = 0
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        frame = load_frame(dataset, index, {}, 0.0)
        sample = devkit.get('sample', info['token'])
        assert len(frame.boxes[TRUTH]) > 5
        for camera, matrix in frame.lidar2img.items():
            token = sample['data'][camera]
            path, boxes, intrinsics = devkit.get_sample_data(token, BoxVisibility.NONE)
            assert frame.images[camera].samefile(path)
            theirs = {}
            for one in boxes:
                points = one.corners()
                if points[2].min() > 1:
                    theirs[one.token] = view_points(points, intrinsics, normalize=True)[:2].T
            for solid in frame.boxes[TRUTH]:
                ours = np.c_[solid, np.ones(8)] @ matrix.T
                if ours[:, 2].min() <= 1:
                    continue
                ours = ours[:, :2] / ours[:, 2:3]
                apart = [
                    np.abs(ours[:, None] - their[None]).max(axis=-1).min(axis=1).max()
                    for their in theirs.values()
                ]
                assert min(apart) < 0.5, f'{camera} of frame {index}: {min(apart)} pixels'
                compared += 1
    assert compared > 10


def test_labels_are_those_of_known_classes_with_points(dataset):
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        seen = [i for i in info['instances'] if i['num_lidar_pts'] > 0]
        unknown = dict(info['eval_ann_info'])
        assert len(load_frame(dataset, index, {}, 0.0).boxes[TRUTH]) == len(seen)
        unknown['gt_labels_3d'] = unknown['gt_labels_3d'].copy()
        unknown['gt_labels_3d'][:2] = -1
        altered = Altered(dict(info, eval_ann_info=unknown))
        assert len(load_frame(altered, index, {}, 0.0).boxes[TRUTH]) == len(seen) - 2


class Altered:
    """A data set of one frame."""

    def __init__(self, info):
        self.info = info

    def get_data_info(self, index):
        return self.info


def test_boxes_are_those_of_the_frame_and_confident(dataset):
    shown = {
        'a': [result(1, (1.0, 0.9), (2.0, 0.2), (3.0, 0.5)), result(0, (4.0, 0.9))],
        'b': [result(0), result(1)],
    }
    frame = load_frame(dataset, 1, shown, 0.5)
    assert list(frame.boxes) == [TRUTH, 'a', 'b']
    assert frame.boxes['a'].mean(axis=1)[:, 0].tolist() == pytest.approx([1.0, 3.0])
    assert frame.boxes['b'].shape == (0, 8, 3)
    other = load_frame(dataset, 0, shown, 0.5)
    assert other.boxes['a'].mean(axis=1)[:, 0].tolist() == pytest.approx([4.0])
    assert not np.array_equal(frame.points, other.points)


def bev(boxes):
    """Pixels of the bird's-eye view, and a function from metres to a place in them."""
    frame = Frame('frame', {}, {}, np.zeros((0, 3)), boxes)
    figure = draw_frame(frame, reach=40)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    (axes,) = figure.axes

    def around(x, y, name):
        """Whether the colour of a line is within two pixels of a place."""
        column, row = axes.transData.transform((x, y))
        row = len(pixels) - row
        patch = pixels[int(row) - 2 : int(row) + 3, int(column) - 2 : int(column) + 3]
        colour = line_of(name, boxes)[0]
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return bool((np.abs(patch - wanted).sum(axis=-1) < 90).any())

    return around


@pytest.mark.parametrize('name', [TRUTH, 'float'])
def test_birds_eye_view_looks_ahead_and_marks_the_front(name):
    """A box 10 m to the right and 20 m ahead that drives to the right."""
    boxes = {TRUTH: np.zeros((0, 8, 3)), 'float': np.zeros((0, 8, 3))}
    around = bev({**boxes, name: corners(box(10, 20, size=(8.0, 4.0, 1.5)))})
    sides = [(10, 18), (10, 22), (6, 20), (14, 20)]
    assert all(around(x, y, name) for x, y in sides)
    assert around(12, 20, name) and not around(8, 20, name)  # from the middle to the front
    assert not any(around(sign * x, -sign * y, name) for x, y in sides for sign in (1, -1))
    assert not any(around(-x, -y, name) or around(y, x, name) for x, y in sides)


def test_each_of_several_has_its_own_line():
    boxes = dict.fromkeys((TRUTH, 'float', 'INT8', 'third'), np.zeros((0, 8, 3)))
    assert len({line_of(name, boxes) for name in boxes}) == 4


def test_a_camera_picture_shows_the_image_and_the_boxes(dataset):
    """The picture with boxes differs from the one without where the box is, not elsewhere."""
    import cv2

    plain = load_frame(dataset, 0, {}, 0.0)
    name = 'CAM_FRONT'
    height, width = cv2.imread(str(plain.images[name])).shape[:2]
    made = corners(box(0, 15))

    def camera(boxes):
        frame = Frame('frame', {name: plain.images[name]}, plain.lidar2img, plain.points, boxes)
        figure = draw_frame(frame)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
        x0, y0, x1, y1 = figure.axes[0].get_window_extent().extents
        return pixels[len(pixels) - int(y1) : len(pixels) - int(y0), int(x0) : int(x1)]

    empty, full = camera({TRUTH: made[:0]}), camera({TRUTH: made})
    rows, columns = np.nonzero(np.abs(full - empty).sum(axis=-1) > 60)
    lines = project_edges(made, plain.lidar2img[name]).reshape(-1, 2)
    scale = np.array([full.shape[1] / width, full.shape[0] / height])
    low, high = lines.min(axis=0) * scale, lines.max(axis=0) * scale
    assert [columns.min(), rows.min()] == pytest.approx(low, abs=4)
    assert [columns.max(), rows.max()] == pytest.approx(high, abs=4)


def test_a_missing_image_is_named(tmp_path):
    frame = Frame('frame', {'CAM_BACK': tmp_path / 'no.jpg'}, {}, np.zeros((0, 3)), {})
    with pytest.raises(OSError, match='no.jpg cannot be read'):
        draw_frame(frame)
