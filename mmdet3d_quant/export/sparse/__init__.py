"""The LiDAR encoder as a file for libspconv, the sparse convolutions of CUDA-BEVFusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from mmdet3d_quant.export.manifest import describe_graph
from mmdet3d_quant.export.sparse.program import Add, Program, ScnError, SparseConv
from mmdet3d_quant.export.sparse.read import read_program
from mmdet3d_quant.export.sparse.trace import trace
from mmdet3d_quant.export.sparse.write import write_program

__all__ = ['Program', 'ScnError', 'export_lidar', 'read_program', 'trace', 'write_program']


def export_lidar(
    encoder: nn.Module,
    path: str | Path,
    order: str | None = None,
    quantized: bool = True,
    output_bound: int = 200_000,
) -> dict[str, Any]:
    """Writes a sparse encoder as CUDA-BEVFusion's ``lidar.backbone.xyz.onnx``.

    Args:
        encoder: A ``SparseEncoder`` of mmdet3d or a ``BEVFusionSparseEncoder``, float or
            quantized. It is not changed.
        path: File to write; it appears whole or not at all.
        order: ``'xyz'`` or ``'zyx'``: the columns of the coordinates that the engine is given;
            by default the encoder's. CUDA-BEVFusion must be told the same (``SCNParameter.order``).
        quantized: False writes FP16 throughout.
        output_bound: Most voxels that a layer may have.

    Returns:
        Entry of the manifest: inputs, outputs, opset, node counts, ``order``, ``grid``, and
        ``layers`` by name with kernel, channels and precisions.

    Raises:
        UncalibratedError: If a quantizer has no range.
        ExportError: If the encoder has what libspconv does not have.
        ScnError: If libspconv would compute it wrongly.
        OSError: If the file cannot be written.
    """
    program = trace(encoder, order, quantized, output_bound)
    model = write_program(program, path)
    return dict(
        describe_graph(model),
        order=program.order,
        grid=list(program.grid),
        layers=[
            dict(
                layer=op.layer,
                node=op.name,
                precision=op.precision,
                output_precision=op.output_precision,
                **(dict(kernel=list(op.weight.shape)) if isinstance(op, SparseConv) else {}),
            )
            for op in program.ops
            if isinstance(op, (SparseConv, Add))
        ],
    )
