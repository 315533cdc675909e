"""Comparison of the file for libspconv with its encoder by SQNR."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mmdet3d_quant.check.runs import sqnr
from mmdet3d_quant.core.modes import set_mode
from mmdet3d_quant.export.sparse.read import read_program
from mmdet3d_quant.export.sparse.run import ScnNetwork
from mmdet3d_quant.export.sparse.trace import order_of


@torch.no_grad()
def verify_lidar(
    encoder: nn.Module,
    path: str | Path,
    features: Tensor,
    coors: Tensor,
    quantized: bool = True,
) -> tuple[float, float]:
    """Compares a file, run in torch with FP16 tensors as libspconv keeps them, with its encoder.

    Args:
        encoder: The encoder that was exported, in eval mode.
        path: Its file.
        features: Voxels of one frame, (N, C).
        coors: (N, 4), in the order of the encoder.
        quantized: Whether the file is.

    Returns:
        Two floats, SQNR in dB: of the fake-quantized encoder against itself in float (infinite if
        not quantized), and of the file against the encoder that was exported. Fake quantization
        on FP16 weights moves some of them by a step, so the second is about as large as the first.

    Raises:
        ScnError: If the file cannot be read or the voxels do not fit it.
    """
    program = read_program(path)
    with set_mode(encoder, 'float'):
        plain = _map(encoder, features, coors)
    with set_mode(encoder, 'quant' if quantized else 'float'):
        wanted = _map(encoder, features, coors)
    at = coors if program.order == order_of(encoder) else coors[:, [0, 3, 2, 1]]
    result = ScnNetwork(program, fp16_tensors=True)(features.cpu(), at.cpu())
    return sqnr(plain, wanted), sqnr(wanted, result)


def _map(encoder: nn.Module, features: Tensor, coors: Tensor) -> Tensor:
    """Runs an encoder on one frame; returns its map on the CPU."""
    out = encoder(features, coors, 1)
    return (out if isinstance(out, Tensor) else out[0]).cpu()
