"""Assignment, targets and losses, each against a calculation of its own."""

import copy
import itertools
import math
import re

import pytest
import torch
from mmdet3d.registry import DATASETS, MODELS, TASK_UTILS
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from mmdet3d_quant.bevfusion.training_targets import heatmap_targets, make_targets
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.data.samples import make_frame
from mmdet3d_quant.runs import from_config as fc
from tests.frame import FLOAT_CONFIG, frame_dataset_cfg, on_real_frame
from tests.small import small_float_config

CFG = dict(
    point_cloud_range=[-20.0, -10.0, -5.0, 20.0, 10.0, 3.0],
    grid_size=[80, 40, 41],
    voxel_size=[0.5, 0.5, 0.2],
    out_size_factor=2,
    gaussian_overlap=0.1,
    min_radius=2,
    pos_weight=-1,
)
CODER = dict(
    type='TransFusionBBoxCoder',
    pc_range=[-20.0, -10.0],
    out_size_factor=2,
    voxel_size=[0.5, 0.5],
    code_size=10,
)
ASSIGNER = dict(
    type='HungarianAssigner3D',
    iou_calculator=dict(type='BboxOverlaps3D', coordinate='lidar'),
    cls_cost=dict(type='mmdet.FocalLossCost', gamma=2.0, alpha=0.25, weight=0.15),
    reg_cost=dict(type='BBoxBEVL1Cost', weight=0.25),
    iou_cost=dict(type='IoU3DCost', weight=0.25),
)


def objects(rows, labels):
    boxes = torch.tensor(rows, dtype=torch.float).reshape(-1, 9)
    return InstanceData(
        bboxes_3d=LiDARInstance3DBoxes(boxes, box_dim=9), labels_3d=torch.tensor(labels)
    )


CARS = [
    [5.2, 3.1, -1.0, 4.0, 2.0, 1.5, 0.3, 1.0, 0.0],
    [-8.0, -4.0, -1.0, 4.5, 1.8, 1.6, -1.2, 0.0, 2.0],
    [5.0, -6.0, -1.0, 0.6, 0.6, 1.7, 0.0, 0.0, 0.5],
]


def test_bev_cost_is_the_l1_distance_in_shares_of_the_map():
    cost = TASK_UTILS.build(dict(type='BBoxBEVL1Cost', weight=0.5))
    a, b = torch.tensor([[0.0, 0.0], [10.0, 5.0]]), torch.tensor([[-20.0, 10.0]])
    wanted = [[0.5 * (20 / 40 + 10 / 20)], [0.5 * (30 / 40 + 5 / 20)]]
    assert cost(a, b, CFG).tolist() == wanted


def test_hungarian_finds_the_cheapest_of_all_assignments():
    torch.manual_seed(0)
    assigner = TASK_UTILS.build(ASSIGNER)
    truth = objects(CARS, [0, 0, 1])
    gt = truth.bboxes_3d.tensor
    proposals = gt[[1, 0, 2, 0, 1]] + 0.4 * torch.randn(5, 9)
    logits = torch.randn(1, 3, 5)
    result = assigner.assign(proposals, gt, truth.labels_3d, logits, CFG)

    scores = logits[0].T.sigmoid()
    positive = 0.25 * (1 - scores) ** 2 * -(scores + 1e-12).log()
    negative = 0.75 * scores**2 * -(1 - scores + 1e-12).log()
    iou = assigner.iou_calculator(proposals, gt)
    cost = 0.15 * (positive - negative)[:, truth.labels_3d] - 0.25 * iou
    apart = (proposals[:, None, :2] - gt[None, :, :2]).abs() / torch.tensor([40.0, 20.0])
    cost += 0.25 * apart.sum(dim=-1)
    best = min(
        itertools.permutations(range(5), 3), key=lambda p: sum(cost[p[i], i] for i in range(3))
    )
    wanted = torch.zeros(5, dtype=torch.long)
    wanted[list(best)] = torch.arange(1, 4)
    assert result.gt_inds.tolist() == wanted.tolist()
    wanted_labels = torch.full((5,), -1)
    wanted_labels[list(best)] = truth.labels_3d
    assert result.labels.tolist() == wanted_labels.tolist()
    assert torch.allclose(result.max_overlaps[list(best)], iou[list(best), range(3)])


def test_heuristic_takes_the_nearest_of_the_class():
    assigner = TASK_UTILS.build(dict(type='HeuristicAssigner3D', dist_thre=3))
    truth = objects(CARS, [0, 0, 1])
    gt = truth.bboxes_3d.tensor
    proposals = gt[[0, 0, 1, 2]].clone()
    proposals[:, 0] += torch.tensor([0.5, 1.0, 4.0, 0.1])
    # The nearest to the first car is of another class; the second car's is 4 m away.
    classes = torch.tensor([1, 0, 0, 1])
    result = assigner.assign(proposals, gt, None, truth.labels_3d, classes)
    assert result.gt_inds.tolist() == [0, 1, 0, 3] and result.labels.tolist() == [-1, 0, -1, 1]
    # Two objects at one proposal: the nearer has it.
    both = torch.cat([gt[:1], gt[:1] + 0.2])
    one = assigner.assign(gt[:1], both, None, torch.tensor([0, 0]), torch.tensor([0]))
    assert one.gt_inds.tolist() == [1]


@pytest.mark.parametrize('kind', ['HungarianAssigner3D', 'HeuristicAssigner3D'])
def test_without_objects_all_is_background(kind):
    cfg = ASSIGNER if kind == 'HungarianAssigner3D' else dict(type=kind)
    proposals, none = torch.rand(4, 9), torch.zeros(0, 9)
    args = (
        (proposals, none, torch.zeros(0).long(), torch.randn(1, 3, 4), CFG)
        if kind == 'HungarianAssigner3D'
        else (proposals, none, None, torch.zeros(0).long())
    )
    result = TASK_UTILS.build(cfg).assign(*args)
    assert result.gt_inds.eq(0).all() and result.labels.eq(-1).all()
    assert result.max_overlaps.eq(0).all()


def test_heatmap_has_a_gaussian_per_object():
    truth = objects([*CARS[:2], CARS[0][:3] + [0.0] * 6], [0, 2, 1])
    heatmap = heatmap_targets(truth.bboxes_3d, truth.labels_3d, 3, CFG)
    assert heatmap.shape == (3, 40, 20)
    assert heatmap[1].eq(0).all()  # no extent
    # Cells are 1 m; the first object lies in cell (25, 13), the second in (12, 6).
    assert heatmap.eq(1).nonzero().tolist() == [[0, 25, 13], [2, 12, 6]]
    spread = heatmap[0]
    radius = int(spread[25, 13:].gt(0).sum()) - 1
    sigma = (2 * radius + 1) / 6
    assert radius >= CFG['min_radius']
    for dx, dy in ((1, 0), (0, 1), (1, 1)):
        wanted = math.exp(-(dx**2 + dy**2) / (2 * sigma**2))
        assert spread[25 + dx, 13 + dy] == pytest.approx(wanted, rel=1e-5)


def outputs_at(truth, count):
    """Outputs of a head whose first proposals are the objects, slightly off."""
    coder = TASK_UTILS.build(CODER)
    codes = torch.zeros(1, count, 10)
    codes[0, : len(truth)] = coder.encode(truth.bboxes_3d.tensor)
    codes = codes + 0.01
    names = dict(center=2, height=1, dim=3, rot=2, vel=2)
    outputs = dict(strict_zip(names, codes.transpose(1, 2).split(list(names.values()), 1)))
    outputs.update(heatmap=torch.zeros(1, 3, count), dense_heatmap=torch.zeros(1, 3, 40, 20))
    return coder, outputs


def test_targets_of_proposals():
    truth = objects(CARS, [0, 2, 1])
    coder, outputs = outputs_at(truth, 8)
    before = copy.deepcopy(outputs)
    args = (TASK_UTILS.build(ASSIGNER), coder)
    targets = make_targets([truth], outputs, *args, CFG, 8)
    assert targets.labels.tolist() == [[0, 2, 1, 3, 3, 3, 3, 3]]
    assert targets.bbox_weights[0, :, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert targets.label_weights.eq(1).all()
    assert torch.allclose(targets.bboxes[0, :3], coder.encode(truth.bboxes_3d.tensor))
    assert targets.num_pos == 3 and 0.8 < targets.matched_iou <= 1
    weighted = make_targets([truth], outputs, *args, dict(CFG, pos_weight=2.0), 8)
    assert weighted.label_weights.tolist() == [[2, 2, 2, 1, 1, 1, 1, 1]]
    assert all(torch.equal(outputs[n], before[n]) for n in before)

    empty = make_targets([objects([], [])], outputs, *args, CFG, 8)
    assert empty.labels.eq(3).all() and empty.num_pos == 0 and empty.heatmap.eq(0).all()


@pytest.fixture(scope='module')
def trainable(tmp_path_factory):
    """A small float model and a batch of its training data."""
    folder = tmp_path_factory.mktemp('train')
    cfg = fc.read_config(small_float_config(make_frame(folder / 'frame'), folder / 'small.py'))
    init_default_scope('mmdet3d')
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    return cfg, next(iter(loader))


def test_a_few_steps_lower_the_loss(trainable):
    cfg, batch = trainable
    torch.manual_seed(0)
    model = fc.build_model(cfg)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    totals = []
    for _ in range(4):
        losses = model(**model.data_preprocessor(copy.deepcopy(batch), True), mode='loss')
        total, parts = model.parse_losses(losses)
        assert all(torch.isfinite(v) for v in parts.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]
    still = [n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])]
    assert still == []


@pytest.mark.slow
@on_real_frame
def test_a_step_of_the_full_model_on_the_real_frame():
    """The ResNet-50 model of configs/bevfusion, 256 x 704 pixels, voxels of 0.075 m."""
    cfg = fc.read_config(FLOAT_CONFIG)
    init_default_scope('mmdet3d')
    dataset = dict(frame_dataset_cfg(cfg), test_mode=False)
    dataset['pipeline'] = [
        s for s in cfg.train_pipeline if s['type'] != 'LoadPointsFromMultiSweeps'
    ]
    batch = pseudo_collate([DATASETS.build(dataset)[0]])
    torch.manual_seed(0)
    model = fc.build_model(cfg)
    model.init_weights()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = model(**model.data_preprocessor(batch, True), mode='loss')
    total, parts = model.parse_losses(losses)
    assert all(torch.isfinite(v) for v in parts.values())
    total.backward()
    assert all(torch.isfinite(p.grad).all() for n, p in model.named_parameters() if n in before)
    optimizer.step()
    still = {n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])}
    # Blocks begin as identities (bn3.weight is 0), so nothing reaches what lies before; weights
    # decay all the same, biases are 0 and stay.
    assert still == {n for n in before if re.fullmatch(r'img_backbone.layer.*\.bn[12]\.bias', n)}


def test_training_without_its_settings_says_what_is_missing(trainable):
    cfg, batch = trainable
    cfg = copy.deepcopy(cfg)
    cfg.model.bbox_head.update(train_cfg=None, loss_bbox=None)
    model = fc.build_model(cfg)
    with pytest.raises(ValueError, match=r'bbox_head.loss_bbox, bbox_head.train_cfg'):
        model(**model.data_preprocessor(copy.deepcopy(batch), True), mode='loss')


def test_losses_are_float32_under_autocast(trainable):
    cfg, batch = trainable
    torch.manual_seed(0)
    model = fc.build_model(cfg)
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model(**data, mode='loss')
    assert {v.dtype for v in losses.values()} == {torch.float32}


def test_each_decoder_layer_has_its_losses():
    head = MODELS.build(
        dict(
            type='TransFusionHead',
            num_proposals=8,
            in_channels=8,
            hidden_channel=8,
            num_classes=3,
            num_decoder_layers=2,
            decoder_layer=dict(
                type='TransformerDecoderLayer',
                self_attn_cfg=dict(embed_dims=8, num_heads=1),
                cross_attn_cfg=dict(embed_dims=8, num_heads=1),
                ffn_cfg=dict(embed_dims=8, feedforward_channels=8),
                norm_cfg=dict(type='LN'),
                pos_encoding_cfg=dict(input_channel=2, num_pos_feats=8),
            ),
            loss_cls=dict(type='mmdet.FocalLoss', use_sigmoid=True),
            loss_heatmap=dict(type='mmdet.GaussianFocalLoss'),
            loss_bbox=dict(type='mmdet.L1Loss', loss_weight=0.25),
            common_heads=dict(center=[2, 2], height=[1, 2], dim=[3, 2], rot=[2, 2], vel=[2, 2]),
            train_cfg=dict(CFG, assigner=ASSIGNER, code_weights=[1.0] * 10),
            test_cfg=dict(dataset='toy', grid_size=[80, 40, 41], out_size_factor=2),
            bbox_coder=CODER,
        )
    )
    truth = objects(CARS, [0, 2, 1])
    losses = head.loss_by_feat(head([torch.randn(1, 8, 40, 20)], None), [truth])
    names = {f'layer_{i}_loss_{k}' for i in (0, -1) for k in ('cls', 'bbox')}
    assert set(losses) == {'loss_heatmap', 'matched_ious', *names}


def test_losses_can_be_normalised_over_processes(monkeypatch):
    """Two processes with 3 and 1 objects: each divides by their mean, as one with 4 would."""
    from mmdet3d_quant.bevfusion import TransFusionHead
    from mmdet3d_quant.bevfusion import losses as module

    class Head(TransFusionHead):
        def __init__(self, sync):
            torch.nn.Module.__init__(self)
            self.sync_avg_factor = sync
            self.class_encoding = torch.nn.Conv1d(1, 1, 1)

    assert [Head(False)._avg_factor(n) for n in (0, 1, 3)] == [1, 1, 3]
    assert [Head(True)._avg_factor(n) for n in (0, 1, 3)] == [1, 1, 3]
    monkeypatch.setattr(module, 'get_world_size', lambda: 2)
    monkeypatch.setattr(module, 'all_reduce', lambda total: total.add_(1))
    assert Head(False)._avg_factor(3) == 3
    assert Head(True)._avg_factor(3) == 2
