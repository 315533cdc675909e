"""Depth learnt from LiDAR points: targets and loss by hand, and nothing of it at inference."""

import numpy as np
import pytest
import torch
from mmdet3d.structures import LiDARInstance3DBoxes, LiDARPoints

from mmdet3d_quant.bevfusion import DepthSupervisedLSSTransform, LabelPoints, LSSTransform
from mmdet3d_quant.core.compat import strict_zip

CFG = dict(
    in_channels=6,
    out_channels=4,
    image_size=[32, 48],
    feature_size=[4, 6],
    xbound=[-8.0, 8.0, 1.0],
    ybound=[-8.0, 8.0, 1.0],
    zbound=[-5.0, 5.0, 10.0],
    dbound=[1.0, 9.0, 0.5],
)


def scene(batch=2, cams=3):
    """Features, points and matrices of cameras that look around."""
    torch.manual_seed(0)
    eye = torch.eye(4)
    intrinsics = eye.clone()
    intrinsics[:2, :3] = torch.tensor([[24.0, 0, 24], [0, 24.0, 16]])
    cam2lidar = torch.stack([eye] * cams)
    for i in range(cams):
        turn = 2 * np.pi * i / cams
        x, z = (np.cos(turn), -np.sin(turn), 0), (np.sin(turn), np.cos(turn), 0)
        y = (0, 0, -1)
        cam2lidar[i, :3, :3] = torch.tensor([x, y, z]).T
    lidar2img = intrinsics @ torch.inverse(cam2lidar)

    def spread(m):
        return m.expand(batch, cams, 4, 4).contiguous()

    matrices = [spread(lidar2img), spread(intrinsics), spread(cam2lidar), spread(eye)]
    points = [torch.rand(80, 5) * 16 - 8 for _ in range(batch)]
    for cloud in points:
        cloud[:, 2] /= 4
    features = torch.randn(batch, cams, 6, 4, 6)
    return features, points, [*matrices, eye.expand(batch, 4, 4).contiguous()]


def build(kind=DepthSupervisedLSSTransform, **kwargs):
    torch.manual_seed(1)
    return kind(**CFG, **kwargs)


def bins_by_hand(points, lidar2img):
    """Nearest point's bin in each cell of 8 x 8 pixels, or -1; one point at a time."""
    result = -np.ones((len(points), len(lidar2img[0]), 4, 6), dtype=int)
    for b, cloud in enumerate(points):
        for n, matrix in enumerate(lidar2img[b].double().numpy()):
            pixels = {}  # the last point of a pixel counts
            for xyz in cloud[:, :3].double().numpy():
                u, v, d = matrix[:3, :3] @ xyz + matrix[:3, 3]
                if d > 0 and 0 <= u / d < 48 and 0 <= v / d < 32:
                    pixels[int(v / d), int(u / d)] = d
            for row in range(4):
                for col in range(6):
                    near = [d for (v, u), d in pixels.items() if (v // 8, u // 8) == (row, col)]
                    if near and 1 <= min(near) < 9:
                        result[b, n, row, col] = int((min(near) - 1) / 0.5)
    return result


def test_targets_are_the_nearest_points():
    features, points, matrices = scene()
    view = build()
    found = view.depth_bins(view.depth_map(points, matrices[0], matrices[3], matrices[4], 3))
    wanted = bins_by_hand(points, matrices[0])
    assert (wanted >= 0).sum() > 30 and (wanted < 0).sum() > 30
    assert np.array_equal(found.view(wanted.shape).numpy(), wanted)


def test_loss_is_the_mean_cross_entropy_of_cells_with_points():
    features, points, matrices = scene()
    view = build(loss_weight=0.5).train()
    view(features, points, *matrices)
    (loss,) = view.pop_losses().values()
    bins = bins_by_hand(points, matrices[0]).reshape(-1, 4, 6)
    logits = view.depthnet(features.flatten(0, 1))[:, : view.D].double()
    terms = [
        -logits[i].log_softmax(0)[bins[i, r, c], r, c]
        for i, r, c in strict_zip(*np.nonzero(bins >= 0))
    ]
    assert loss.item() == pytest.approx(0.5 * torch.stack(terms).mean().item(), rel=1e-5)
    loss.backward()
    assert view.depthnet.weight.grad[: view.D].abs().sum() > 0
    assert view.depthnet.weight.grad[view.D :].abs().sum() == 0
    assert view.pop_losses() == {}


def test_the_map_and_the_state_are_those_of_the_plain_transform():
    features, points, matrices = scene()
    view, plain = build(), build(LSSTransform)
    assert view.state_dict().keys() == plain.state_dict().keys()
    wanted = plain.eval()(features, None, *matrices)
    assert torch.equal(view.train()(features, points, *matrices), wanted)
    view.pop_losses()
    assert torch.equal(view.eval()(features, None, *matrices), wanted)
    assert view.pop_losses() == {}


def test_without_points_in_sight_the_loss_is_zero():
    features, points, matrices = scene()
    view = build().train()
    view(features, [p[:0] for p in points], *matrices)
    assert view.pop_losses()['loss_depth'] == 0


def test_training_without_points_says_what_to_add():
    features, points, matrices = scene()
    for few in (None, points[:1]):
        with pytest.raises(ValueError, match="add 'points' to the keys of Pack3DDetInputs"):
            build().train()(features, few, *matrices)


def test_labels_are_those_of_the_nearest_points():
    """Against a loop over points; each point's label is its own, so that the choice shows."""
    features, points, matrices = scene()
    for cloud in points:
        cloud[:, 4] = torch.arange(len(cloud))
    found = build(class_weight=1.0, num_labels=4).labels(points, *(matrices[i] for i in (0, 3, 4)))
    for b, cloud in enumerate(points):
        for n, matrix in enumerate(matrices[0][b].double().numpy()):
            seen = {}
            for i, xyz in enumerate(cloud[:, :3].double().numpy()):
                u, v, d = matrix[:3, :3] @ xyz + matrix[:3, 3]
                if d > 1e-3 and 0 <= u / d < 48 and 0 <= v / d < 32:
                    seen[int(v / d), int(u / d)] = d, i  # the last point of a pixel counts
            cells = {}
            for (v, u), (d, i) in seen.items():
                cells[v // 8, u // 8] = min(cells.get((v // 8, u // 8), (np.inf, -1)), (d, i))
            assert len(cells) > 3
            for row, col in np.ndindex(4, 6):
                if (row, col) in cells:
                    assert found[3 * b + n, row, col] == cells[row, col][1]


def test_class_loss_teaches_the_first_channels_of_the_context():
    features, points, matrices = scene()
    for cloud in points:
        cloud[:, 4] = torch.arange(len(cloud)) % 3
    view = build(class_weight=2.0, num_labels=3).train()
    view(features, points, *matrices)
    loss = view.pop_losses()['loss_class']
    labels = view.labels(points, *(matrices[i] for i in (0, 3, 4)))
    logits = view.depthnet(features.flatten(0, 1))[:, view.D : view.D + 3].double()
    counts = [(labels == k).sum() for k in range(3)]
    total = weights = 0.0
    for i, r, c in strict_zip(*np.nonzero(labels.numpy() >= 0)):
        label = labels[i, r, c]
        weight = (counts[label] + 1) ** -0.5
        total += -weight * logits[i].log_softmax(0)[label, r, c]
        weights += weight
    assert loss.item() == pytest.approx(2 * (total / weights).item(), rel=1e-5)
    loss.backward()
    grad = view.depthnet.weight.grad.abs().flatten(1).sum(1)
    assert (grad[view.D : view.D + 3] > 0).all() and grad[view.D + 3 :].sum() == 0


def test_more_labels_than_channels_are_refused():
    with pytest.raises(ValueError, match='num_labels=5 needs as many out_channels, got 4'):
        build(class_weight=1.0, num_labels=5)


@pytest.mark.parametrize('count', [2, 0])
def test_points_are_labelled_by_the_box_they_lie_in(count):
    boxes = torch.tensor([[4.0, 0, -1, 4, 2, 2, 0.0], [0, 6, -1, 4, 2, 2, np.pi / 2]])[:count]
    # in the first; beside it; above it; in the turned one, along its length; far away
    xyz = [[5.9, 0.9, 0], [5.9, 1.1, 0], [4, 0, 1.1], [0.9, 7.9, 0], [30, 0, 0]]
    points = torch.cat([torch.tensor(xyz), torch.full((5, 2), 7.0)], 1)
    results = dict(
        points=LiDARPoints(points, points_dim=5),
        gt_bboxes_3d=LiDARInstance3DBoxes(boxes.reshape(-1, 7)),
        gt_labels_3d=np.array([2, 0])[:count],
    )
    found = LabelPoints().transform(results)['points'].tensor
    assert found[:, -1].tolist() == ([3, 0, 0, 1, 0] if count else [0] * 5)
    assert torch.equal(found[:, :4], points[:, :4])
