"""From a sparse encoder to a program, by walking its modules; nothing is run or patched."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

from mmdet3d_quant.core.joined import untouched
from mmdet3d_quant.core.modes import require_calibrated
from mmdet3d_quant.export.onnx import ExportError
from mmdet3d_quant.export.sparse.arithmetic import LIBSPCONV, Arithmetic, computed_as
from mmdet3d_quant.export.sparse.builder import ProgramBuilder
from mmdet3d_quant.export.sparse.check import check
from mmdet3d_quant.export.sparse.precision import with_precisions
from mmdet3d_quant.export.sparse.program import Axes, Program
from mmdet3d_quant.export.sparse.walk import owner, walk
from mmdet3d_quant.export.weight_scales import raise_scales
from mmdet3d_quant.layers.fold import fold_known

#: Class whose `forward` an encoder has -> order of its axes. Another forward is another network.
_ORDERS = {'SparseEncoder': 'zyx', 'PortableSparseEncoder': 'zyx', 'BEVFusionSparseEncoder': 'xyz'}
#: Orders of encoder and file -> transposition after the scattering.
_TAILS: dict[tuple[str, str], Axes | None] = {
    ('xyz', 'xyz'): (0, 1, 4, 2, 3),  # (C, x, y, z) to (C, z, x, y)
    ('xyz', 'zyx'): (0, 1, 2, 4, 3),  # (C, z, y, x) to (C, z, x, y)
    ('zyx', 'zyx'): None,  # (C, z, y, x) as it is
}


def trace(
    encoder: nn.Module,
    order: str | None = None,
    quantized: bool = True,
    output_bound: int = 200_000,
    arithmetic: Arithmetic = LIBSPCONV,
) -> Program:
    """Converts an encoder to a program that computes the same on one frame.

    Batch norm is folded into a copy of the encoder, and ReLUs after convolutions become part
    of them, as libspconv wants it.

    Args:
        encoder: A ``SparseEncoder`` of mmdet3d or a ``BEVFusionSparseEncoder``, quantized or not,
            of spconv 2 or mmcv. With ``return_middle_feats`` only the map is exported.
        order: Order of the axes in the file, ``'xyz'`` or ``'zyx'``; by default the encoder's.
            The map is the same, the columns of the coordinates are not.
        quantized: False leaves out the ranges: all of it is FP16.
        output_bound: Most voxels that a layer may have; libspconv reserves memory for them.
        arithmetic: How the runtime computes sparse layers; what it has in floating point loses its
            ranges.

    Returns:
        The program, checked.

    Raises:
        ExportError: If the encoder has something that the runtime does not have; names it.
        UncalibratedError: If a quantizer has no range.
        ScnError: If the program is not one that the runtime computes; names the layer.
    """
    native = order_of(encoder)
    order = order or native
    if (native, order) not in _TAILS:
        raise ExportError(
            f'a {type(encoder).__name__} has its axes in the order {native}; '
            f'{arithmetic.name} cannot make its map from {order!r}'
        )
    if quantized:
        require_calibrated(encoder)
    _refuse_hooks(encoder, arithmetic.name)
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    if quantized:
        encoder = computed_as(encoder, arithmetic)
    kept, _ = fold_known(encoder, quantized=quantized)
    raise_scales(encoder)
    grid = tuple(encoder.sparse_shape)
    builder = ProgramBuilder(grid, order != native, quantized, output_bound, kept, arithmetic.name)
    x = walk(builder, 'conv_input', encoder.conv_input, '0')
    for name, stage in encoder.encoder_layers.named_children():
        x = walk(builder, f'encoder_layers.{name}', stage, x)
    x = walk(builder, 'conv_out', encoder.conv_out, x)
    program = builder.finish(x, order, _TAILS[native, order], encoder.in_channels)
    program = replace(program, arithmetic=arithmetic)
    if any(op.input_range is not None for op in program.convs):
        program = with_precisions(program)
    check(program)
    return program


def _refuse_hooks(encoder: nn.Module, runtime: str) -> None:
    """Refuses modules that compute more than their class says, which a walk does not see."""
    for name, module in encoder.named_modules():
        if not untouched(module):
            raise ExportError(
                f'{name or type(encoder).__name__} has forward hooks, or another forward put in, '
                f'which a file for {runtime} would not have: remove them before the export'
            )


def order_of(encoder: nn.Module) -> str:
    """Looks up the axes of an encoder's grid and coordinates, ``'xyz'`` or ``'zyx'``.

    Raises:
        ExportError: If it is none of the encoders that can be exported.
    """
    if owner(encoder) not in _ORDERS:
        raise ExportError(
            f'{type(encoder).__name__} computes what {owner(encoder)}.forward says; only '
            f'{", ".join(_ORDERS)} can be exported'
        )
    return _ORDERS[owner(encoder)]
