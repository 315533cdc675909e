"""Painting order: far parts before those that hide them.

The order is exact for boxes that do not overlap: between each two there is a plane, and the box on
the camera's side of the plane cannot be hidden by the one beyond.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np

from mmdet3d_quant.synthetic.sensors import Pose
from mmdet3d_quant.synthetic.world import Thing


def paint_order(before: np.ndarray, distance: np.ndarray) -> list[int]:
    """Finds an order with ``i`` before ``j`` wherever ``before[i, j]``, else from far to near.

    Args:
        before: (N, N) of bool. Cycles, which overlapping boxes can give, are cut at the farthest.
        distance: (N,), metres.
    """
    needs = [sum(1 << int(i) for i in np.nonzero(column)[0]) for column in before.T]
    left = sorted(range(len(distance)), key=lambda k: -distance[k])
    waiting, order = (1 << len(distance)) - 1, []
    while left:
        pick = next((k for k in left if not needs[k] & waiting & ~(1 << k)), left[0])
        left.remove(pick)
        waiting &= ~(1 << pick)
        order.append(pick)
    return order


def parts_before(
    low: np.ndarray, high: np.ndarray, eye: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Computes which of axis-aligned boxes go before which, (N, N), and their distances, (N,).

    Args:
        low: Lower corners, (N, 3).
        high: Upper corners, (N, 3).
        eye: Position of the camera, (3,), in the same frame.
    """
    eps = 1e-6
    before = np.zeros((len(low), len(low)), dtype=bool)
    for axis in range(3):
        beyond = low[None, :, axis] >= high[:, None, axis] - eps  # j lies above i along the axis
        above = (eye[axis] >= high[:, axis])[:, None]
        before |= beyond & above  # the eye is on j's side of i's upper face
        before |= (beyond & ~above).T
    middle = (low + high) / 2
    return before & ~before.T, np.linalg.norm(middle - eye, axis=1)


def things_before(
    things: Sequence[Thing], poses: Sequence[Pose], eye: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Does as :func:`parts_before` for upright boxes of any heading, disjoint on the ground."""
    half = np.array([[t.size[1] / 2, t.size[0] / 2] for t in things]).reshape(-1, 2)
    spot = np.array([[p.x, p.y] for p in poses]).reshape(-1, 2)
    yaw = np.array([p.yaw for p in poses])
    ahead = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1)
    axes = np.stack([ahead, np.stack([-ahead[:, 1], ahead[:, 0]], axis=-1)], axis=1)  # (N, 2, 2)
    signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]])
    corners = spot[:, None] + np.einsum('cn,jn,jnk->jck', signs, half, axes)
    local = np.einsum('iak,ijck->ijca', axes, corners[None] - spot[:, None, None])
    view = np.einsum('iak,ik->ia', axes, eye[:2] - spot)
    before = np.zeros((len(things), len(things)), dtype=bool)
    for axis in range(2):
        for sign in (1, -1):
            beyond = (sign * local[..., axis]).min(axis=2) >= half[:, None, axis] - 1e-6
            outside = (sign * view[:, axis] >= half[:, axis])[:, None]
            before |= beyond & outside
            before |= (beyond & ~outside).T
    return before & ~before.T, np.linalg.norm(spot - eye[:2], axis=1)
