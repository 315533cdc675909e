"""Trains the public BEVFusion project and ours one step on the real frame, side by side.

Example:
    MMDET3D_BEVFUSION_PROJECT=~/mmdetection3d python tests/reference/compare_training.py \\
        --out out.json

A small model, float, in training mode without dropout: same frame, same random numbers, same
weights. The sparse encoder is frozen: spconv's backward needs a GPU, so the public one cannot
train here (ours is compared with dense convolutions in tests/parents).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2])]

from mmdet3d.registry import DATASETS, MODELS  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

from mmdet3d_quant.core.compat import strict_zip  # noqa: E402
from mmdet3d_quant.data.samples import real_frame  # noqa: E402
from tests.reference.compare import difference, import_public  # noqa: E402
from tests.small import GRID, small_float_config  # noqa: E402

MATRICES = ('img_aug_matrix', 'lidar_aug_matrix')
GRID_MASK = dict(
    type='GridMask', use_h=True, use_w=True, max_epoch=6, prob=0.5, mode=1, fixed_prob=True
)


def without_dropout(node: object) -> object:
    """A config whose dropouts are 0."""
    if isinstance(node, dict):
        return {
            k: 0.0 if k in ('dropout', 'ffn_drop') else without_dropout(v) for k, v in node.items()
        }
    return [without_dropout(v) for v in node] if isinstance(node, list) else node


def batch_of(dataset: dict, seeds: tuple[int, ...]) -> dict:
    """One frame, augmented differently for every seed."""
    built = DATASETS.build(copy.deepcopy(dataset))
    samples = []
    for seed in seeds:
        np.random.seed(seed)
        torch.manual_seed(seed)
        samples.append(built[0])
    return pseudo_collate(samples)


@contextmanager
def in_float64() -> Iterator[None]:
    """Lets ``x.float()`` and matrices be float64, in the public code and in ours."""
    from mmdet3d_quant.bevfusion import detector  # not before the public project

    stacked = detector.stack_matrices
    with ExitStack() as stack:
        stack.enter_context(patch.object(Tensor, 'float', Tensor.double))
        stack.enter_context(
            patch.object(detector, 'stack_matrices', lambda *a: [m.double() for m in stacked(*a)])
        )
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


class SameMatches:
    """Solves what the public project asks, and gives ours the same answers.

    Objects of a class may swap their proposals at no cost, distances being in the L1 norm: which
    of the best matches a solver returns is decided by the last bit. So ours gets the public ones,
    once they are seen to be best for our costs too.
    """

    def __init__(self) -> None:
        self.known: list[tuple[np.ndarray, np.ndarray]] = []

    def solve(self, cost: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """For the public project."""
        self.known.append(linear_sum_assignment(cost))
        return self.known[-1]

    def recall(self, cost: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """For ours."""
        known = self.known.pop(0)
        best = linear_sum_assignment(cost)
        values = np.asarray(cost)
        np.testing.assert_allclose(values[known].sum(), values[best].sum(), rtol=1e-6)
        return known


def step(
    model_cfg: dict, batch: dict, weights: dict | None
) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, gradients and the weights of before, in float64.

    In float32 the batch norms of a deep net make 1e-3 of a difference in the last bit, more than a
    mistake would.
    """
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(model_cfg)).double()
    model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # at 0, which ends a residual, hides what is before
            nn.init.uniform_(module.weight, 0.5, 1.5)
    if weights is not None:
        model.load_state_dict(weights, strict=True)
    before = copy.deepcopy(model.state_dict())
    model.train()
    # spconv knows no float64
    encoder = model.pts_middle_encoder.requires_grad_(False).to(torch.float32)
    encoder.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(torch.float32), *inputs[1:]))
    encoder.register_forward_hook(lambda _, inputs, output: output.double())
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    data['inputs']['imgs'] = data['inputs']['imgs'].double()
    data['inputs']['points'] = [points.double() for points in data['inputs']['points']]
    losses = model(**data, mode='loss')
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: v.item() for n, v in losses.items()}, grads, before


def targets_of(model_cfg: dict, batch: dict) -> dict[str, Tensor]:
    """Losses and gradients of the head on proposals near the objects, where overlaps count."""
    head = MODELS.build(copy.deepcopy(model_cfg['bbox_head']))
    truth = [sample.gt_instances_3d for sample in batch['data_samples']]
    torch.manual_seed(0)
    codes = torch.zeros(len(truth), head.num_proposals, head.bbox_coder.code_size)
    labels = torch.randint(head.num_classes, codes.shape[:2])
    for i, objects in enumerate(truth):
        chosen = torch.randperm(len(objects))[: head.num_proposals - 5]
        codes[i, : len(chosen)] = head.bbox_coder.encode(objects.bboxes_3d.tensor[chosen])
        labels[i, : len(chosen)] = objects.labels_3d[chosen]
    codes = codes + 0.1 * torch.randn_like(codes)
    parts = dict(center=2, height=1, dim=3, rot=2, vel=2)
    outputs = dict(strict_zip(parts, codes.transpose(1, 2).split(list(parts.values()), 1)))
    outputs['heatmap'] = torch.randn(len(truth), head.num_classes, head.num_proposals)
    side = [n // model_cfg['bbox_head']['test_cfg']['out_size_factor'] for n in GRID[:2]]
    outputs['dense_heatmap'] = torch.randn(len(truth), head.num_classes, *side)
    leaves = {n: v.detach().requires_grad_() for n, v in outputs.items()}
    outputs = {n: v.clone() for n, v in leaves.items()}  # the public head writes into its inputs
    head.query_labels = outputs['query_labels'] = labels
    losses = head.loss_by_feat(([outputs],), truth)
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    found = {f'loss.{n}': v.detach()[None] for n, v in losses.items()}
    return {**found, **{f'grad.{n}': v.grad for n, v in leaves.items()}}


def inputs_of(batch: dict) -> dict[str, Tensor]:
    """Everything augmented in a batch, by name."""
    found = {}
    for i, sample in enumerate(batch['data_samples']):
        found[f'{i}.img'] = batch['inputs']['img'][i]
        found[f'{i}.points'] = batch['inputs']['points'][i]
        found[f'{i}.boxes'] = sample.gt_instances_3d.bboxes_3d.tensor
        found[f'{i}.labels'] = sample.gt_instances_3d.labels_3d
        for key in MATRICES:
            found[f'{i}.{key}'] = torch.as_tensor(np.stack(sample.metainfo[key]))
    return found


def main() -> None:
    """Compares and writes the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, required=True, help='where to write the figures')
    args = parser.parse_args()
    torch.set_num_threads(1)  # spconv's CPU convolutions are wrong with more
    import_public(Path(os.environ['MMDET3D_BEVFUSION_PROJECT']).expanduser())
    import mmdet3d_quant.bevfusion as ours
    from mmdet3d_quant.bevfusion import assigner

    public = sys.modules['projects.BEVFusion.bevfusion.utils']
    assert MODELS.get('BEVFusion') is not ours.BEVFusion, 'ours must yield to the public project'
    init_default_scope('mmdet3d')
    MMLogger.get_instance('compare', log_level='ERROR')
    with tempfile.TemporaryDirectory() as folder:
        cfg = Config.fromfile(small_float_config(real_frame(), Path(folder) / 'small.py'))
    model = ConfigDict(without_dropout(cfg.model.to_dict()))
    dataset = cfg.train_dataloader.dataset.to_dict()
    dataset['pipeline'].insert(-1, GRID_MASK)
    seeds = (0, 1)

    public_batch = batch_of(dataset, seeds)
    public_targets = targets_of(model, public_batch)
    matches = SameMatches()
    with in_float64(), patch.object(public, 'linear_sum_assignment', matches.solve):
        public_losses, public_grads, weights = step(model, public_batch, None)
    for registry, classes in ours.FAMILY:
        for cls in classes:
            registry.register_module(module=cls, force=True)
    our_batch = batch_of(dataset, seeds)
    our_targets = targets_of(model, public_batch)
    with in_float64(), patch.object(assigner, 'linear_sum_assignment', matches.recall):
        our_losses, our_grads, _ = step(model, public_batch, weights)

    theirs, mine = inputs_of(public_batch), inputs_of(our_batch)
    report = dict(
        inputs={n: difference(mine[n], theirs[n]) for n in theirs},
        losses={n: (our_losses.get(n), v) for n, v in public_losses.items()},
        grads={
            n: dict(difference(our_grads[n], g), norm=max(g.norm(), our_grads[n].norm()).item())
            for n, g in public_grads.items()
            if n in our_grads
        },
        targets={n: difference(our_targets[n], v) for n, v in public_targets.items()},
        overlap=public_targets['loss.matched_ious'].item(),
        missing=sorted(public_grads.keys() ^ our_grads.keys()),
        boxes=sum(len(theirs[f'{i}.boxes']) for i in range(len(seeds))),
    )
    args.out.write_text(json.dumps(report, indent=1))
    for name, (mine_, theirs_) in report['losses'].items():
        print(f'{name:24s} ours {mine_:.7g}  public {theirs_:.7g}')
    print(f'mean overlap of the crafted proposals: {report["overlap"]:.3f}')
    for kind in ('inputs', 'targets', 'grads'):
        worst = max(report[kind].items(), key=lambda item: item[1]['l2'])
        print(f'{len(report[kind])} {kind}, worst l2 {worst[1]["l2"]:.1e} ({worst[0]})')


if __name__ == '__main__':
    main()
