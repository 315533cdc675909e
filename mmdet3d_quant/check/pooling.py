"""A view transform whose BEV pooling runs from OpenVINO's file, to score the file itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdet3d_quant.engines import Engine
from mmdet3d_quant.export.bev_pool import intervals_of


def pool_in(view: Any, engine: Engine) -> None:
    """Lets a file do the pooling of a view transform, frame by frame.

    Args:
        view: The view transform; changed.
        engine: With the file that ``export.bev_pool`` made of it.
    """

    def splat(geom: Tensor, context: Tensor, depth: Tensor) -> Tensor:
        frames, cameras = geom.shape[:2]
        maps = []
        for i in range(frames):
            mine = slice(i * cameras, (i + 1) * cameras)
            cells = view.cells(geom[i : i + 1])
            indices, intervals = intervals_of(cells, int(view.nx[0] * view.nx[1]))
            tensors = dict(
                camera_feature=context[mine].permute(0, 2, 3, 1).contiguous(),
                camera_depth_weights=depth[mine],
                indices=indices,
                intervals=intervals,
            )
            arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
            maps.append(torch.from_numpy(engine(arrays)['feat_in']).to(context))
        return torch.cat(maps)

    view.splat = splat
