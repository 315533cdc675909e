"""The dense parts of a BEVFusion as Autoware's files have them, as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.export.cuts import Fuser
from mmdet3d_quant.export.pairs import ExportError

#: Rows of ``bbox_pred`` in order, as the head predicts them.
ROWS = ('center', 'height', 'dim', 'rot', 'vel')


class Body(Fuser):
    """The maps of all sensors to boxes of one frame.

    ``forward(*maps)``: maps as of :class:`Fuser`, with B = 1; returns ``bbox_pred`` (10, P),
    ``score`` (P,), of the query's class, and ``label_pred`` (P,), int64.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__(detector)
        self.bbox_head = require_head(detector)

    def forward(self, *maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        return self.predicted(super().forward(*maps))

    def predicted(self, middle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicts from the head's map (1, C, X, Y), as :meth:`forward` returns it."""
        outputs = self.bbox_head.forward_single(middle)[0]
        found = self.bbox_head.scored(outputs)
        rows = torch.cat([found[name][0] for name in ROWS])
        return rows, found['score'][0].amax(0), outputs['query_labels'][0]


def require_head(detector: nn.Module) -> nn.Module:
    """Finds the head of a detector that Autoware decodes.

    Raises:
        ExportError: If it has another.
    """
    head: Any = getattr(detector, 'bbox_head', None)
    kind = type(head).__name__
    if not hasattr(head, 'scored'):
        raise ExportError(
            f'bbox_head is a {kind}, and autoware_bevfusion decodes queries: take the '
            'TransFusionHead of mmdet3d_quant.bevfusion'
        )
    if not hasattr(head.prediction_heads[0], 'vel'):
        raise ExportError(
            f'bbox_head ({kind}) predicts no velocity, and bbox_pred has two rows for it: train '
            'with common_heads=dict(vel=(2, 2), ...), or take another --runtime'
        )
    return head
