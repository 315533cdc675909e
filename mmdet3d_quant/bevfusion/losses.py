"""Losses of the TransFusion head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Dict, List, Tuple

import torch
from mmdet3d.structures import Det3DDataSample
from mmengine.dist import all_reduce, get_world_size
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet3d_quant.bevfusion.training_targets import make_targets

#: What the head's forward returns.
Outputs = Tuple[List[Dict[str, Tensor]]]


class HeadLosses(nn.Module):
    """Losses of a TransFusion head, which subclasses this and sets the attributes."""

    losses: dict[str, Any]
    bbox_assigner: Any
    bbox_coder: Any
    train_cfg: Any
    num_proposals: int
    sync_avg_factor: bool
    class_encoding: nn.Module

    def loss(
        self, batch_feats: Tensor | Sequence[Tensor], batch_data_samples: list[Det3DDataSample]
    ) -> dict[str, Tensor]:
        """Computes the losses of a batch, in float32 under autocast too: positions span the map.

        Args:
            batch_feats: Map or maps, as :meth:`forward` takes them.
            batch_data_samples: With ``gt_instances_3d``.

        Returns:
            See :meth:`loss_by_feat`.
        """
        maps = [batch_feats] if isinstance(batch_feats, Tensor) else batch_feats
        with torch.autocast(maps[0].device.type, enabled=False):
            outputs = self([m.float() for m in maps], [s.metainfo for s in batch_data_samples])
            return self.loss_by_feat(outputs, [s.gt_instances_3d for s in batch_data_samples])

    def loss_by_feat(
        self, preds_dicts: Outputs, batch_gt_instances_3d: list[InstanceData]
    ) -> dict[str, Tensor]:
        """Computes the losses of the result of :meth:`forward`.

        Args:
            preds_dicts: Result of :meth:`forward`.
            batch_gt_instances_3d: Per sample ``bboxes_3d`` and ``labels_3d``.

        Returns:
            ``loss_heatmap``; per decoder layer ``layer_i_loss_cls`` and ``layer_i_loss_bbox``
            (the last is ``layer_-1``); ``matched_ious``, which is no loss.

        Raises:
            ValueError: If the head was built without what training needs.
        """
        needs = [f'loss_{n}' for n in ('cls', 'bbox', 'heatmap') if n not in self.losses]
        needs += ['train_cfg'] if self.bbox_assigner is None else []
        if needs:
            names = ', '.join(f'bbox_head.{n}' for n in needs)
            raise ValueError(f'to train, TransFusionHead needs {names}; the config has none')
        outputs = preds_dicts[0][0]
        targets = make_targets(
            batch_gt_instances_3d,
            outputs,
            self.bbox_assigner,
            self.bbox_coder,
            self.train_cfg,
            self.num_proposals,
        )
        dense = outputs['dense_heatmap'].sigmoid().clamp(1e-4, 1 - 1e-4)
        peaks = self._avg_factor(targets.heatmap.eq(1).sum().item())
        losses = dict(loss_heatmap=self.losses['heatmap'](dense, targets.heatmap, avg_factor=peaks))
        objects = self._avg_factor(targets.num_pos)
        quantities = [outputs[n] for n in ('center', 'height', 'dim', 'rot')]
        quantities += [outputs['vel']] if 'vel' in outputs else []
        regressed = torch.cat(quantities, dim=1).transpose(1, 2)
        scores = outputs['heatmap'].transpose(1, 2)
        code_weights = regressed.new_tensor(self.train_cfg['code_weights'])
        layers = scores.shape[1] // self.num_proposals
        for i in range(layers):
            part = slice(i * self.num_proposals, (i + 1) * self.num_proposals)
            name = f'layer_{-1 if i == layers - 1 else i}'
            losses[f'{name}_loss_cls'] = self.losses['cls'](
                scores[:, part].flatten(0, 1),
                targets.labels[:, part].flatten(),
                targets.label_weights[:, part].flatten(),
                avg_factor=objects,
            )
            losses[f'{name}_loss_bbox'] = self.losses['bbox'](
                regressed[:, part],
                targets.bboxes[:, part],
                targets.bbox_weights[:, part] * code_weights,
                avg_factor=objects,
            )
        losses['matched_ious'] = scores.new_tensor(targets.matched_iou)
        return losses

    def _avg_factor(self, count: float) -> float:
        """Computes the divisor (``avg_factor``) of a loss summed over ``count`` objects."""
        if not self.sync_avg_factor:
            return max(count, 1)
        total = torch.tensor(float(count), device=self.class_encoding.weight.device)
        all_reduce(total)
        return max(total.item(), 1) / get_world_size()
