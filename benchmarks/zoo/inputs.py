"""Weights and inputs with which random models compute living values, and their runs."""

from __future__ import annotations

from typing import Any

import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import mmdet3d_quant as mq
from mmdet3d_quant.export import detector_cuts
from mmdet3d_quant.export.examples import sparse_encoder

#: Voxels of a sparse encoder.
VOXELS = 20_000
#: Standard deviation, in pixels, of the places that deformable convolutions sample.
_REACH = 1.0


@torch.no_grad()
def settle(detector: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Draws dense weights, and batch-norm statistics with which signals neither fade nor grow.

    Norms that their config freezes get statistics, too. Deformable convolutions get weights, and
    sample around the places where plain ones do.
    """
    norms = [m for m in detector.modules() if isinstance(m, _BatchNorm)]
    for module in detector.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    for module in detector.modules():
        if isinstance(module, (DeformConv2d, ModulatedDeformConv2d)):
            nn.init.kaiming_normal_(module.weight)
            offsets = module.conv_offset
            fan_in = offsets.weight[0].numel()
            nn.init.normal_(offsets.weight, std=_REACH / fan_in**0.5)
            nn.init.zeros_(offsets.bias)
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    with mq.set_mode(detector, 'float'):
        run(detector, inputs)
    for norm in norms:
        norm.training = False


def voxels(encoder: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random features and coordinates of a sparse encoder, dense near the middle."""
    rng = torch.Generator().manual_seed(seed)
    shape = torch.tensor(encoder.sparse_shape)
    places = (torch.randn(VOXELS, 3, generator=rng) * 0.15 + 0.5).clamp(0, 0.999)
    cells = torch.unique((places * shape).int(), dim=0)
    coors = torch.cat([torch.zeros(len(cells), 1, dtype=torch.int32), cells], 1)
    return torch.rand(len(coors), encoder.in_channels, generator=rng), coors


def cropped(inputs: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """Inputs cut to a largest side; of a volume, to a quarter."""
    small = {}
    for name, x in inputs.items():
        limit = side // 4 if name == 'volume' else side
        first = 2 if name in ('volume', 'bev') else x.dim() - 2
        cut = [slice(0, limit) if first <= d < first + 2 else slice(None) for d in range(x.dim())]
        small[name] = x[tuple(cut)].contiguous()
    return small


def run(detector: Any, inputs: dict[str, Tensor], encode: bool = True) -> list[Tensor]:
    """Runs the cuts, and the sparse encoder; returns all outputs."""
    found: list[Tensor] = []
    encoder = sparse_encoder(detector)
    if encode and encoder is not None:
        found += outputs(encoder(*voxels(encoder), 1))
    for cut in detector_cuts(detector, inputs):
        found += outputs(cut.module(*cut.inputs.values()))
    return found


def outputs(made: Any) -> list[Tensor]:
    """The tensors of one output or of several."""
    return [made] if isinstance(made, Tensor) else [x for part in made for x in outputs(part)]
