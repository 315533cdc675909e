"""Pictures of frames with their boxes, and of scores; drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from mmengine.dataset import BaseDataset
from mmengine.structures import InstanceData

from mmdet3d_quant.core.compat import removeprefix

TRUTH = 'ground truth'
#: Name -> colour, width and dashes; of Okabe and Ito, told apart by the colour-blind too.
_LINES = ('#56B4E9', 1.4, 'solid'), ('#E69F00', 1.4, (0, (3, 2))), ('#F0E442', 1.0, (0, (1, 1)))
_TRUTH_LINE = ('#00C78C', 2.2, 'solid')
_GRID = (
    ('CAM_FRONT_LEFT', 'CAM_FRONT', 'CAM_FRONT_RIGHT'),
    ('CAM_BACK_LEFT', 'CAM_BACK', 'CAM_BACK_RIGHT'),
)
#: Corners of mmdet3d's LiDAR boxes that an edge joins, and those of the lower front edge.
_EDGES = np.array(
    [[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 6]]
    + [[6, 7], [7, 4], [0, 4], [1, 5], [2, 6], [3, 7]]
)
_FLOOR, _FRONT = [0, 3, 7, 4, 0], [4, 7]
_NEAR = 0.3  # metres in front of a camera


@dataclass(frozen=True)
class Frame:
    """Images, points and boxes of one key frame, to be drawn.

    Attributes:
        name: Title of the picture.
        images: Paths by camera.
        lidar2img: LiDAR frame to pixels by camera, (4, 4).
        points: Key frame's LiDAR points, (P, >=3), metres.
        boxes: Corners (n, 8, 3) of boxes, metres in the LiDAR frame, by name of their source:
            :data:`TRUTH` first, then models.
    """

    name: str
    images: dict[str, Path]
    lidar2img: dict[str, np.ndarray]
    points: np.ndarray
    boxes: dict[str, np.ndarray]


def load_frame(
    dataset: BaseDataset,
    index: int,
    detections: Mapping[str, Sequence[Mapping[str, Any]]],
    threshold: float,
) -> Frame:
    """Reads a key frame and picks its boxes.

    Args:
        dataset: A nuScenes data set of mmdet3d in test mode.
        index: Index of the frame in it.
        detections: Results of ``evaluation.predict`` for the data set, by name of the model.
        threshold: Least score of a box.

    Returns:
        The frame; of the labelled boxes, those of the data set's classes that have LiDAR points.
    """
    info = dataset.get_data_info(index)
    matrices = {}
    for name, camera in info['images'].items():
        full = np.eye(4)
        full[:3, :3] = camera['cam2img']
        matrices[name] = full @ np.asarray(camera['lidar2cam'])
    lidar = info['lidar_points']
    points = np.fromfile(lidar['lidar_path'], np.float32).reshape(-1, lidar['num_pts_feats'])
    truth = info['eval_ann_info']  # mmdet3d left out those without points
    boxes = {TRUTH: _corners(truth['gt_bboxes_3d'][truth['gt_labels_3d'] >= 0])}
    for name, samples in detections.items():
        (sample,) = (s for s in samples if s['sample_idx'] == info['sample_idx'])
        boxes[name] = _corners(_confident(sample['pred_instances_3d'], threshold).bboxes_3d)
    images = {name: Path(camera['img_path']) for name, camera in info['images'].items()}
    return Frame(f'frame {index}', images, matrices, points, boxes)


def _confident(instances: InstanceData, threshold: float) -> InstanceData:
    return instances[instances.scores_3d >= threshold]


def _corners(boxes: Any) -> np.ndarray:
    return boxes.corners.numpy().reshape(-1, 8, 3)


def draw_frame(frame: Frame, reach: float = 40.0, threshold: float | None = None) -> Figure:
    """Draws six cameras in two rows, and the bird's-eye view beside them.

    Args:
        frame: The frame.
        reach: Half the side of the bird's-eye view, metres.
        threshold: Least score of the boxes, for the legend.

    Returns:
        A figure; ``figure.savefig`` writes it.
    """
    figure = Figure(figsize=(18, 5.5), facecolor='#181818')
    grid = figure.add_gridspec(
        2, 4, width_ratios=(1.76, 1.76, 1.76, 2.1), left=0.003, right=0.997, top=0.995,
        bottom=0.075, wspace=0.01, hspace=0.015,
    )  # fmt: skip
    for row, names in enumerate(_GRID):
        for column, name in enumerate(names):
            if name in frame.images:
                _draw_camera(figure.add_subplot(grid[row, column]), frame, name)
    _draw_bev(figure.add_subplot(grid[:, 3]), frame, reach)
    handles = []
    for name, boxes in frame.boxes.items():
        colour, width, dashes = line_of(name, frame.boxes)
        text = f'{name}: {len(boxes)}'
        handles.append(Line2D([], [], color=colour, lw=width, ls=dashes, label=text))
    title = frame.name if threshold is None else f'{frame.name}, boxes scored {threshold} or more'
    figure.text(0.005, 0.02, title, color='white', fontsize=12)
    figure.legend(
        handles=handles, loc='lower right', ncol=len(handles), frameon=False, fontsize=12,
        labelcolor='white', handlelength=4, borderaxespad=0.2,
    )  # fmt: skip
    return figure


def line_of(name: str, boxes: Mapping[str, Any]) -> tuple[str, float, Any]:
    """Looks up colour, width and dashes of a set of boxes."""
    models = [other for other in boxes if other != TRUTH]
    return _TRUTH_LINE if name == TRUTH else _LINES[models.index(name) % len(_LINES)]


def draw_frames(
    dataset: BaseDataset,
    detections: Mapping[str, Sequence[Mapping[str, Any]]],
    count: int,
    threshold: float,
) -> dict[str, Figure]:
    """Draws frames spread over a data set.

    Args:
        dataset: See :func:`load_frame`.
        detections: See :func:`load_frame`.
        count: Number of frames; the first and the last are never among them.
        threshold: Least score of a box.

    Returns:
        Figures by name of the frame.
    """
    frames = (
        load_frame(dataset, int(index), detections, threshold)
        for index in np.linspace(0, len(dataset) - 1, count + 2).astype(int)[1:-1]
    )
    return {frame.name: draw_frame(frame, threshold=threshold) for frame in frames}


def _draw_camera(axes: Axes, frame: Frame, name: str) -> None:
    image = cv2.imread(str(frame.images[name]))
    if image is None:
        raise OSError(f'image {frame.images[name]} cannot be read')
    axes.imshow(image[..., ::-1])
    height, width = image.shape[:2]
    for who, corners in frame.boxes.items():
        colour, thickness, dashes = line_of(who, frame.boxes)
        segments = list(project_edges(corners, frame.lidar2img[name]))
        axes.add_collection(
            LineCollection(segments, colors=colour, linewidths=thickness * 0.7, linestyles=dashes)
        )
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.text(
        8, 8, removeprefix(name, 'CAM_').replace('_', ' ').lower(), color='white', fontsize=10,
        va='top', bbox=dict(facecolor='black', alpha=0.5, linewidth=0, pad=2),
    )  # fmt: skip


def project_edges(corners: np.ndarray, lidar2img: np.ndarray) -> np.ndarray:
    """Projects edges of boxes to lines in an image, clipped in front of the camera.

    Args:
        corners: (n, 8, 3), metres.
        lidar2img: (4, 4).

    Returns:
        (m, 2, 2): start and end of each line in pixels, x and y; they may lie outside.
    """
    if not len(corners):
        return np.zeros((0, 2, 2))
    homogeneous = np.concatenate([corners, np.ones((*corners.shape[:2], 1))], axis=-1)
    ends = (homogeneous @ lidar2img.T)[:, _EDGES, :3].reshape(-1, 2, 3)
    ends = ends[(ends[..., 2] > _NEAR).any(axis=1)]
    start, end = ends[:, 0], ends[:, 1]
    slope = (end - start) / np.where(start[:, 2:] == end[:, 2:], 1, end[:, 2:] - start[:, 2:])
    cut = start + (_NEAR - start[:, 2:]) * slope
    ends = np.where(ends[..., 2:] > _NEAR, ends, cut[:, None])
    return ends[..., :2] / ends[..., 2:]


def _draw_bev(axes: Axes, frame: Frame, reach: float) -> None:
    axes.set_facecolor('#181818')
    x, y, z = frame.points[:, :3].T
    axes.scatter(x, y, s=0.35, c=np.clip(z, -2, 2), cmap='gray', vmin=-4, vmax=3, linewidths=0)
    axes.plot(0, 0, marker=(3, 0, 0), color='#CC79A7', markersize=8)
    for who, corners in frame.boxes.items():
        colour, width, dashes = line_of(who, frame.boxes)
        outline = list(corners[:, _FLOOR, :2])
        middle = corners[:, _FLOOR[:4], :2].mean(axis=1)
        front = corners[:, _FRONT, :2].mean(axis=1)
        axes.add_collection(LineCollection(outline, colors=colour, linewidths=width, ls=dashes))
        axes.add_collection(
            LineCollection(np.stack([middle, front], axis=1), colors=colour, linewidths=width)
        )
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect='equal')
    text = f"bird's-eye view, {2 * reach:.0f} m, forward is up"
    axes.text(0.02, 0.98, text, color='white', fontsize=10, va='top', transform=axes.transAxes)


def draw_ap(ap: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draws bars of the average precision per class.

    Args:
        ap: Name of a model -> class -> average precision, 0 to 1; the same classes for each.

    Returns:
        A figure.
    """
    classes = list(next(iter(ap.values())))
    figure = Figure(figsize=(10, 3.6), layout='constrained')
    axes = figure.subplots()
    width = 0.8 / len(ap)
    places = np.arange(len(classes))
    for row, (name, values) in enumerate(ap.items()):
        colour, hatch = (('#0072B2', ''), ('#E69F00', '//'), ('#CC79A7', '..'))[row % 3]
        at = places + (row - (len(ap) - 1) / 2) * width
        heights = [values[c] for c in classes]
        axes.bar(at, heights, width, label=name, color=colour, hatch=hatch, edgecolor='white')
    axes.set_xticks(places, [c.replace('_', '\n') for c in classes], fontsize=9)
    axes.set(ylabel='AP', ylim=(0, 1))
    axes.grid(axis='y', alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, ncol=len(ap), loc='upper center', bbox_to_anchor=(0.5, 1.16))
    return figure


def save(figure: Figure, path: str | Path | BinaryIO, dpi: int = 100) -> None:
    """Writes a figure as PNG."""
    with matplotlib.rc_context({'savefig.facecolor': 'auto'}):
        figure.savefig(path, format='png', dpi=dpi)
