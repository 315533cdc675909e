"""The parts of a BEVFusion as Autoware's files have them, as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.export.cuts import Fuser
from mmdet3d_quant.export.pairs import ExportError
from mmdet3d_quant.export.sparse.arithmetic import computed_as
from mmdet3d_quant.export.sparse.program import Program
from mmdet3d_quant.export.sparse.run import ScnNetwork

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


class FromVoxels(nn.Module):
    """A body behind the sparse encoder in Autoware's arithmetic: the whole file, in torch.

    ``forward(voxels, coors, num_points_per_voxel, *rest)``: voxels as ``export.runtimes`` has them,
    and what the body takes besides the map; returns what the body does.

    Args:
        body: A :class:`Body`, which reads the map.
        program: The encoder.
        encoder: What it was traced from, for mode ``float`` of a quantized file; None: the program
            in every mode.
    """

    def __init__(self, body: nn.Module, program: Program, encoder: nn.Module | None = None) -> None:
        super().__init__()
        for name, child in body.named_children():  # called as in the detector
            self.add_module(name, child)
        vars(self)['body'] = body
        self.network = ScnNetwork(program, fp16_tensors=True)
        own = None if encoder is None else computed_as(encoder, program.arithmetic)
        self.pts_middle_encoder = own

    def forward(
        self, voxels: Tensor, coors: Tensor, counts: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        means = voxels.sum(1) / counts[:, None]
        columns = coors.flip(1) if self.network.program.order == 'xyz' else coors
        places = functional.pad(columns, (1, 0))
        return self.body(self._map(means, places), *rest)

    def _map(self, means: Tensor, places: Tensor) -> Tensor:
        encoder = self.pts_middle_encoder
        if encoder is None or any(q.mode != 'float' for q in quantizers(self).values()):
            return self.network(means, places)
        out = encoder(means, places, 1)
        return out if isinstance(out, Tensor) else out[0]


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
