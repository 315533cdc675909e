"""View transforms against per-point loops written from the geometry's definition."""

import math

import numpy as np
import pytest
import torch

from mmdet3d_quant.parents import DepthLSSTransform, LSSTransform
from tests.parents.small import CAMS, CFG, build


def rigid(yaw, shift):
    c, s = math.cos(yaw), math.sin(yaw)
    matrix = torch.eye(4)
    matrix[:2, :2] = torch.tensor([[c, -s], [s, c]])
    matrix[:3, 3] = torch.tensor(shift)
    return matrix


def calibration():
    """One sample, two cameras that look along +x and -x, with both augmentations."""
    forward = torch.tensor([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    camera2lidar = torch.stack(
        [rigid(0.1, [0.5, 0.2, 0.3]) @ forward, rigid(math.pi, [-0.4, 0.0, 0.1]) @ forward]
    )
    intrinsics = torch.eye(4).repeat(CAMS, 1, 1)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = 20.0
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = 24.0, 16.0
    img_aug = torch.eye(4).repeat(CAMS, 1, 1)
    img_aug[:, 0, 0] = img_aug[:, 1, 1] = 0.5
    img_aug[:, :2, 3] = torch.tensor([0.5, -0.25])
    lidar_aug = rigid(0.3, [0.2, -0.1, 0.05])
    lidar2image = intrinsics @ torch.inverse(camera2lidar)
    return [m[None] for m in (lidar2image, intrinsics, camera2lidar, img_aug, lidar_aug)]


def geometry(model, matrices):
    _, intrinsics, camera2lidar, img_aug, lidar_aug = matrices
    return model.get_geometry(
        camera2lidar[..., :3, :3],
        camera2lidar[..., :3, 3],
        intrinsics[..., :3, :3],
        img_aug[..., :3, :3],
        img_aug[..., :3, 3],
        extra_rots=lidar_aug[..., :3, :3],
        extra_trans=lidar_aug[..., :3, 3],
    )


def test_geometry_projects_back_to_the_frustum():
    model, matrices = build(), calibration()
    lidar2image, _, _, img_aug, lidar_aug = matrices
    geom = geometry(model, matrices)
    assert geom.shape == (1, CAMS, 6, 2, 3, 3)
    points = torch.nn.functional.pad(geom[0].double(), (0, 1), value=1.0)
    points = torch.einsum('ij,ndhwj->ndhwi', torch.inverse(lidar_aug[0].double()), points)
    points = torch.einsum('nij,ndhwj->ndhwi', lidar2image[0].double(), points)
    depth = points[..., 2]
    pixel = torch.stack([*(points[..., :2] / depth[..., None]).unbind(-1)], -1) * 0.5
    pixel += img_aug[0, 0, :2, 3].double()
    back = torch.cat([pixel, depth[..., None]], -1)
    wanted = model.frustum.double().expand_as(back)
    torch.testing.assert_close(back, wanted, atol=1e-4, rtol=1e-4)


def test_splat_puts_every_bin_into_its_cell():
    model, geom = build(), geometry(build(), calibration())
    torch.manual_seed(0)
    geom = geom + torch.randn_like(geom)  # also across the lower edges, where truncation acts
    context = torch.randn(CAMS, 4, 2, 3)
    depth = torch.rand(CAMS, 6, 2, 3)
    wanted, kept = np.zeros((1, 2 * 4, 8, 6), dtype=np.float64), 0
    for n, d, h, w in np.ndindex(CAMS, 6, 2, 3):
        lower = np.array([-8.0, -6.0, -4.0])
        index = (geom[0, n, d, h, w].numpy() - lower) / np.array([2.0, 2.0, 4.0])
        x, y, z = (math.trunc(i) for i in index)
        if 0 <= x < 8 and 0 <= y < 6 and 0 <= z < 2:
            kept += 1
            value = depth[n, d, h, w].item() * context[n, :, h, w].numpy()
            wanted[0, z * 4 : z * 4 + 4, x, y] += value
    out = model.splat(geom, context, depth)
    assert 0 < kept < depth.numel()
    np.testing.assert_allclose(out.numpy(), wanted, atol=1e-5)


def test_bins_just_below_the_first_edge_count_as_inside():
    model = build()
    geom = torch.full((1, CAMS, 6, 2, 3, 3), 0.5)
    geom[..., 0] = -9.9  # one cell of 2 m starts at -8
    ones = torch.ones(CAMS, 6, 2, 3)
    assert model.splat(geom, torch.ones(CAMS, 4, 2, 3), ones)[0, 4, 0, 3] == ones.numel()
    geom[..., 0] = -10.1
    assert model.splat(geom, torch.ones(CAMS, 4, 2, 3), ones).eq(0).all()


def test_samples_stay_apart():
    model = build(LSSTransform)
    x = torch.randn(2, CAMS, 6, 2, 3)
    matrices = [m.expand(2, *m.shape[1:]).clone() for m in calibration()]
    matrices[4][1] = rigid(-0.8, [1.0, 0.3, 0.0])
    with torch.no_grad():
        both = model(x, None, *matrices)
        alone = [model(x[i : i + 1], None, *(m[i : i + 1] for m in matrices)) for i in range(2)]
    assert both.abs().sum() > 0
    torch.testing.assert_close(both, torch.cat(alone))


def depth_by_loop(points, matrices):
    lidar2image, _, _, img_aug, lidar_aug = (m[0].double().numpy() for m in matrices)
    out = np.zeros((CAMS, *CFG['image_size']))
    for n in range(CAMS):
        for point in points.double().numpy():
            p = np.linalg.inv(lidar_aug[:3, :3]) @ (point[:3] - lidar_aug[:3, 3])
            p = lidar2image[n, :3, :3] @ p + lidar2image[n, :3, 3]
            d = np.clip(p[2], 1e-5, 1e5)
            col, row = img_aug[n, :2, :2] @ (p[:2] / d) + img_aug[n, :2, 3]
            if 0 <= row < 16 and 0 <= col < 24:
                out[n, int(row), int(col)] = d
    return out


def test_depth_map_last_point_wins_and_points_are_untouched():
    model, matrices = build(), calibration()
    torch.manual_seed(0)
    points = torch.randn(1500, 5) * torch.tensor([8.0, 8, 2, 1, 1])
    before = points.clone()
    lidar2image, _, _, img_aug, lidar_aug = matrices
    out = model.depth_map([points], lidar2image, img_aug, lidar_aug, CAMS)
    wanted = depth_by_loop(points, matrices)
    assert torch.equal(points, before)
    assert out.shape == (1, CAMS, 1, 16, 24)
    assert 100 < (wanted > 0).sum() < 400  # many pixels are hit more than once
    np.testing.assert_allclose(out[0, :, 0].numpy(), wanted, rtol=1e-4)


def test_no_points_give_an_empty_depth_map():
    model, matrices = build(), calibration()
    out = model.depth_map([torch.zeros(0, 5)], matrices[0], matrices[3], matrices[4], CAMS)
    assert out.shape == (1, CAMS, 1, 16, 24) and out.eq(0).all()


def test_lift_gives_a_distribution_and_forward_the_map():
    model, matrices = build(zbound=[-4.0, 4.0, 8.0], downsample=2), calibration()
    x, points = torch.randn(1, CAMS, 6, 2, 3), [torch.randn(500, 5) * 5]
    with torch.no_grad():
        depth_map = model.depth_map(points, matrices[0], matrices[3], matrices[4], CAMS)
        context, depth = model.lift(x, depth_map)
        out = model(x, points, *matrices, None)
        wanted = model.downsample(model.splat(geometry(model, matrices), context, depth))
    assert context.shape == (CAMS, 4, 2, 3) and depth.shape == (CAMS, 6, 2, 3)
    torch.testing.assert_close(depth.sum(1), torch.ones(CAMS, 2, 3))
    assert out.shape == (1, 4, 4, 3)
    torch.testing.assert_close(out, wanted)


def test_every_convolution_comes_through_the_seam():
    class Spy(DepthLSSTransform):
        def _conv(self, part, *args, **kwargs):
            conv = super()._conv(part, *args, **kwargs)
            made.append((part, conv))
            return conv

    made = []
    model = Spy(**(dict(CFG, zbound=[-4.0, 4.0, 8.0], downsample=2)))
    inside = {m for m in model.modules() if isinstance(m, torch.nn.Conv2d)}
    assert inside == {conv for _, conv in made}
    assert [part for part, _ in made] == ['dtransform'] * 3 + ['depthnet'] * 3 + ['downsample'] * 3


def test_arguments_are_checked():
    with pytest.raises(ValueError, match='downsample must be 1 or 2, got 4'):
        build(downsample=4)
    with pytest.raises(ValueError, match='downsample=2 works on maps of one height'):
        build(downsample=2)
    with pytest.raises(ValueError, match='expected 1, got none'):
        build()(torch.randn(1, CAMS, 6, 2, 3), None, *calibration())
