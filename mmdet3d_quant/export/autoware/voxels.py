"""The nodes in front of the sparse encoder: from what the voxel generator makes to its inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

#: Names of the means of the points by voxel, float32 (M, C) and float16, and of the places, int32
#: (M, 4).
MEANS, FEATURES, PLACES = 'lidar/means', 'lidar/voxels', 'lidar/indices'


def voxel_nodes(order: str) -> tuple[list[NodeProto], list[TensorProto]]:
    """Averages the points in each voxel, and brings coordinates (z, y, x) into an order.

    Args:
        order: ``'xyz'`` or ``'zyx'``: axes of the encoder.

    Returns:
        Nodes from ``voxels``, ``coors`` and ``num_points_per_voxel`` to :data:`FEATURES` and
        :data:`PLACES`, and their stored tensors.
    """
    axes = (0, 2, 1, 0) if order == 'xyz' else (0, 0, 1, 2)  # the first becomes the frame, zero
    stored: dict[str, np.ndarray] = {
        'lidar/points': np.array([1], np.int64),
        'lidar/column': np.array([-1, 1], np.int64),
        'lidar/axes': np.array(axes, np.int64),
        'lidar/mask': np.array([[0, 1, 1, 1]], np.int32),
    }
    make = helper.make_node
    nodes = [
        make('ReduceSum', ['voxels', 'lidar/points'], ['lidar/sums'], 'lidar/sums', keepdims=0),
        make('Cast', ['num_points_per_voxel'], ['lidar/counts'], 'lidar/counts', to=1),
        make('Reshape', ['lidar/counts', 'lidar/column'], ['lidar/divisors'], 'lidar/divisors'),
        make('Div', ['lidar/sums', 'lidar/divisors'], [MEANS], MEANS),
        make('Cast', [MEANS], [FEATURES], FEATURES, to=TensorProto.FLOAT16),
        make('Gather', ['coors', 'lidar/axes'], ['lidar/columns'], 'lidar/columns', axis=1),
        make('Mul', ['lidar/columns', 'lidar/mask'], [PLACES], PLACES),
    ]
    return nodes, [numpy_helper.from_array(value, name) for name, value in stored.items()]


def voxel_inputs(inputs: Mapping[str, Tensor], order: str, points: int) -> dict[str, Tensor]:
    """Makes the body's inputs of those of the sparse encoder: every point is its voxel's mean.

    Args:
        inputs: ``voxels`` (M, C) and ``coors`` (M, 4), frame first.
        order: Columns of ``coors`` behind the frame, ``'xyz'`` or ``'zyx'``.
        points: Most points of a voxel.

    Returns:
        ``voxels`` float32 (M, points, C), ``coors`` int32 (M, 3), z, y, x, and
        ``num_points_per_voxel`` int32 (M,).
    """
    means, places = inputs['voxels'].float(), inputs['coors'][:, 1:].int()
    return dict(
        voxels=means[:, None].repeat(1, points, 1),
        coors=places.flip(1) if order == 'xyz' else places,
        num_points_per_voxel=torch.full_like(places[:, 0], points),
    )
