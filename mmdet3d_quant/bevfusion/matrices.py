"""Camera matrices of a batch, from the meta information of its samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MATRICES = ('lidar2img', 'cam2img', 'cam2lidar')


def stack_matrices(metas: list[dict], like: Tensor) -> list[Tensor]:
    """Stacks the camera matrices of all samples.

    Args:
        metas: Per sample ``lidar2img``, ``cam2img`` and ``cam2lidar``, each N (4, 4); optionally
            ``img_aug_matrix``, N (4, 4), and ``lidar_aug_matrix``, (4, 4), else the identity.
        like: Images (B, N, ...), whose device the result gets.

    Returns:
        In the order of the view transform, float32: ``lidar2img``, ``cam2img``, ``cam2lidar`` and
        ``img_aug_matrix`` (B, N, 4, 4), ``lidar_aug_matrix`` (B, 4, 4).

    Raises:
        ValueError: If a matrix is missing.
    """
    for sample, meta in enumerate(metas):
        missing = [key for key in _MATRICES if key not in meta]
        if missing:
            raise ValueError(
                f'BEVFusion: meta information of sample {sample} lacks {", ".join(missing)}; '
                'load images with BEVLoadMultiViewImageFromFiles and name them in meta_keys'
            )

    def stack(key: str, default: np.ndarray | None = None) -> Tensor:
        arrays = np.stack([np.asarray(meta.get(key, default)) for meta in metas])
        return torch.as_tensor(arrays, dtype=torch.float32, device=like.device)

    eye = np.eye(4)
    return [
        *(stack(key) for key in _MATRICES),
        stack('img_aug_matrix', np.broadcast_to(eye, (like.shape[1], 4, 4))),
        stack('lidar_aug_matrix', eye),
    ]
