"""Scene augmentations: the recorded matrix is what happened to the points and the boxes."""

import copy

import numpy as np
import pytest
import torch
from mmdet3d.structures import LiDARInstance3DBoxes, LiDARPoints

from mmdet3d_quant.bevfusion import (
    BEVFusionGlobalRotScaleTrans,
    BEVFusionRandomFlip3D,
    GridMask,
)


def frame():
    torch.manual_seed(0)
    points = torch.cat([torch.rand(50, 3) * 40 - 20, torch.rand(50, 2)], dim=1)
    boxes = torch.rand(6, 9) * 10 - 5
    boxes[:, 3:6] = torch.rand(6, 3) + 1
    return dict(
        points=LiDARPoints(points, points_dim=5),
        gt_bboxes_3d=LiDARInstance3DBoxes(boxes, box_dim=9, origin=(0.5, 0.5, 0.5)),
    )


def moved(xyz, matrix):
    """Points (n, 3) under a homogeneous (4, 4) matrix."""
    return xyz @ torch.as_tensor(matrix[:3, :3]).float().T + torch.as_tensor(matrix[:3, 3]).float()


@pytest.mark.parametrize('seed', range(6))
def test_lidar_aug_matrix_maps_the_scene(seed):
    np.random.seed(seed)
    before = frame()
    after = copy.deepcopy(before)
    for transform in (
        BEVFusionGlobalRotScaleTrans(
            rot_range=[-0.78, 0.78], scale_ratio_range=[0.9, 1.1], translation_std=0.5
        ),
        BEVFusionRandomFlip3D(),
    ):
        after = transform(after)
    matrix = after['lidar_aug_matrix']
    assert not np.allclose(matrix, np.eye(4))
    assert torch.allclose(after['points'].coord, moved(before['points'].coord, matrix), atol=1e-4)
    old, new = before['gt_bboxes_3d'], after['gt_bboxes_3d']
    assert torch.allclose(new.gravity_center, moved(old.gravity_center, matrix), atol=1e-4)
    # Corners too, so that yaw and size agree: as sets, since a mirror reorders them.
    corners = moved(old.corners.flatten(0, 1), matrix).view_as(new.corners)
    gap = torch.cdist(corners, new.corners).amin(dim=-1)
    assert gap.max() < 1e-3
    # Velocities turn and grow with the scene but do not move.
    linear = torch.as_tensor(matrix[:2, :2]).float()
    assert torch.allclose(new.tensor[:, 7:9], old.tensor[:, 7:9] @ linear.T, atol=1e-4)


def test_both_flips_happen_and_masks_follow():
    seen = set()
    for seed in range(30):
        np.random.seed(seed)
        mask = np.arange(24).reshape(1, 4, 6)
        out = BEVFusionRandomFlip3D()(dict(gt_masks_bev=mask))
        signs = tuple(np.diag(out['lidar_aug_matrix'])[:2].astype(int))
        seen.add(signs)
        assert (out['gt_masks_bev'] == mask[:, :: signs[0], :: signs[1]]).all()
    assert seen == {(1, 1), (1, -1), (-1, 1), (-1, -1)}


def mask_frame(**kwargs):
    np.random.seed(5)
    mask = GridMask(use_h=True, use_w=True, max_epoch=10, fixed_prob=True, **kwargs)
    return mask(dict(img=[np.full((64, 96, 3), 7.0), np.full((64, 96, 3), 9.0)]))['img']


def test_grid_mask_blanks_a_grid():
    first, second = mask_frame()
    kept = first[..., 0] != 0
    assert (first[kept] == 7).all() and (second[kept] == 9).all() and (second[~kept] == 0).all()
    # What stays is rows times columns: a grid.
    assert (kept == kept.any(1, keepdims=True) & kept.any(0, keepdims=True)).all()
    assert 0.05 < kept.mean() < 0.95
    inverse, _ = mask_frame(mode=1)
    assert ((inverse[..., 0] != 0) == ~kept).all()
    noisy, _ = mask_frame(offset=True)
    assert (noisy[kept] == 7).all() and np.abs(noisy[~kept]).max() <= 1 and noisy[~kept].any()


def test_grid_mask_comes_in_with_the_epochs():
    mask = GridMask(use_h=True, use_w=True, max_epoch=10, prob=0.8)
    mask.set_epoch(5)
    assert mask.prob == pytest.approx(0.4)
    mask.set_epoch(0)
    image = np.ones((8, 8, 3))
    np.random.seed(0)
    assert all((mask(dict(img=[image]))['img'][0] == image).all() for _ in range(20))
