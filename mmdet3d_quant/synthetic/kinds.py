"""The ten detection classes of nuScenes, and unlabelled scenery: sizes, numbers, speeds."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """Sizes, numbers and motion of a class of objects.

    Attributes:
        category: Category name of nuScenes; empty for scenery without labels.
        size: Mean width, length, height, metres.
        spread: Standard deviation of the logarithm of the size.
        number: Mean number in a layout.
        moving: Share that moves.
        speed: Slowest and fastest, m/s.
        group: Most members of a row or crowd; 1 for singles.
    """

    category: str
    size: tuple[float, float, float]
    spread: float
    number: float
    moving: float = 0.0
    speed: tuple[float, float] = (0.0, 0.0)
    group: int = 1


KINDS = {
    'bus': Kind('vehicle.bus.rigid', (2.9, 10.8, 3.4), 0.08, 1.1, 0.5, (2, 8)),
    'trailer': Kind('vehicle.trailer', (2.9, 11.0, 3.8), 0.1, 1.1, 0.25, (1, 6)),
    'truck': Kind('vehicle.truck', (2.5, 7.0, 2.9), 0.12, 1.8, 0.4, (2, 9)),
    'construction_vehicle': Kind('vehicle.construction', (2.8, 6.4, 3.1), 0.12, 1.2, 0.2, (0.5, 2)),
    'car': Kind('vehicle.car', (1.9, 4.5, 1.65), 0.07, 6.5, 0.4, (2, 11), 5),
    'barrier': Kind('movable_object.barrier', (2.4, 0.6, 1.0), 0.1, 4.5, group=4),
    'motorcycle': Kind('vehicle.motorcycle', (0.8, 2.1, 1.15), 0.08, 2.2, 0.5, (2, 9)),
    'bicycle': Kind('vehicle.bicycle', (0.62, 1.75, 1.1), 0.08, 2.4, 0.5, (1.5, 5)),
    'pedestrian': Kind('human.pedestrian.adult', (0.68, 0.72, 1.75), 0.08, 6.5, 0.6, (0.5, 1.8), 6),
    'traffic_cone': Kind('movable_object.trafficcone', (0.42, 0.42, 1.0), 0.14, 4.5, group=4),
}
SCENERY = {
    'building': Kind('', (9.0, 12.0, 6.0), 0.3, 2.5),
    'wall': Kind('', (0.4, 7.0, 2.0), 0.3, 1.2),
    'tree': Kind('', (2.6, 2.6, 5.0), 0.25, 3.0),
    'bush': Kind('', (1.3, 1.8, 1.1), 0.25, 2.5),
    'debris': Kind('', (0.8, 0.9, 0.7), 0.3, 2.5),
    'pole': Kind('', (0.8, 0.8, 5.0), 0.2, 5.0),
}
CLASSES = tuple(KINDS)
