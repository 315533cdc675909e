"""Comparison of the file for libspconv with its encoder by SQNR."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mmdet3d_quant.check.fit import range_fits
from mmdet3d_quant.check.runs import run_torch, sqnr
from mmdet3d_quant.check.verify import Agreement, cost_fault, nonfinite, output_fault
from mmdet3d_quant.export.cuts import Cut
from mmdet3d_quant.export.sparse.read import read_program
from mmdet3d_quant.export.sparse.run import ScnNetwork
from mmdet3d_quant.export.sparse.trace import order_of

#: Least SQNR of a file against its encoder, and how far it may be below what quantization costs:
#: FP16 weights and tensors move some values by a step of INT8.
FILE_DB, MARGIN_DB = 40.0, -3.0


class _Encoder(nn.Module):
    """The map of an encoder for one frame."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.pts_middle_encoder = encoder

    def forward(self, voxels: Tensor, coors: Tensor) -> Tensor:
        out = self.pts_middle_encoder(voxels, coors, 1)
        return out if isinstance(out, Tensor) else out[0]


@torch.no_grad()
def judge_lidar(
    encoder: nn.Module,
    path: str | Path,
    features: Tensor,
    coors: Tensor,
    quantized: bool = True,
    real: bool = True,
) -> Agreement:
    """Compares a file, run in torch with FP16 tensors as libspconv keeps them, with its encoder.

    Args:
        encoder: The encoder that was exported, in eval mode.
        path: Its file.
        features: Voxels of one frame, (N, C).
        coors: (N, 4), in the order of the encoder.
        quantized: Whether the file is.
        real: Whether the voxels are data; else ranges, which are of data, are not judged by them.

    Returns:
        :class:`Agreement` of the map, with a fault if it is not finite or not close enough, ranges
        do not fit, or a layer has more voxels than the file has room for. Fake quantization on FP16
        weights moves some of them by a step, so it is about as close to the encoder as that is to
        itself in float.

    Raises:
        ScnError: If the file cannot be read or the voxels do not fit it.
    """
    path, name = Path(path), 'lidar'
    cut = Cut(path.stem, _Encoder(encoder), {'voxels': features, 'coors': coors}, (name,))
    plain = run_torch(cut, 'float')[name]
    wanted = run_torch(cut, 'quant' if quantized else 'float')[name]
    program = read_program(path)
    at = coors if program.order == order_of(encoder) else coors[:, [0, 3, 2, 1]]
    network = ScnNetwork(program, fp16_tensors=True)
    found = network(features.cpu(), at.cpu()).numpy()
    cost, closeness = sqnr(plain, wanted), sqnr(wanted, found)
    fault = nonfinite('torch', name, wanted)
    fault = fault or output_fault('libspconv', name, closeness, _least(cost), found)
    fault = fault or '; '.join(network.crowded())
    fault = fault or cost_fault(name, cost, range_fits(cut) if quantized and real else {})
    int8 = sum(op.precision == 'int8' for op in program.convs)
    return Agreement(path.stem, name, cost, None, None, int8, len(program.convs), fault, closeness)


def verify_lidar(
    encoder: nn.Module,
    path: str | Path,
    features: Tensor,
    coors: Tensor,
    quantized: bool = True,
) -> tuple[float, float]:
    """Measures a file as :func:`judge_lidar` does, without a judgement.

    Returns:
        Two floats, SQNR in dB: of the fake-quantized encoder against itself in float (infinite if
        not quantized), and of the file against the encoder that was exported.

    Raises:
        ScnError: If the file cannot be read or the voxels do not fit it.
    """
    found = judge_lidar(encoder, path, features, coors, quantized, real=False)
    assert found.libspconv is not None
    return found.fake_quant, found.libspconv


def _least(cost: float) -> float:
    """Computes the least SQNR of a file; NaN as a cost counts as nothing."""
    return min(FILE_DB, cost + MARGIN_DB) if cost == cost else FILE_DB
