"""Choice of the layers that compute in INT8, and of the tensors that are kept in it.

libspconv keeps a tensor once, in the precision of the layer that makes it and with one scale,
which it takes from the layers that read it. Its Add wants both summands in one precision. Hence:

* a convolution that has ranges computes in INT8;
* a tensor is INT8 if all its readers are, and they must have one range for it;
* an Add computes in INT8 if both its inputs are INT8. If another reader wants one of them in FP16,
  the Add is FP16 too.

For a BEVFusion with its first convolution float that gives what NVIDIA's exporter sets by hand:
`conv_input` in FP16 with INT8 output, everything else INT8, and the output of `conv_out` FP16.
"""

from __future__ import annotations

from dataclasses import replace

from mmdet3d_quant.export.onnx import ExportError
from mmdet3d_quant.export.sparse.program import Add, Op, Program, SparseConv, conflicts


def with_precisions(program: Program) -> Program:
    """Sets the precisions of a program whose quantized layers have ranges.

    A layer that is left in FP16 gets the range of its input from INT8 readers of the same
    tensor, if there are any, so that it does not take their scale away.

    Other runtimes than libspconv keep tensors in floating point: there a convolution that has
    ranges is INT8, and nothing else.

    Raises:
        ExportError: If INT8 readers of one tensor have unequal ranges.
    """
    if program.arithmetic.kept != 'readers':
        return replace(program, ops=tuple(_rounding_itself(op) for op in program.ops))
    int8 = {op.name for op in program.ops if _ranged(op)}
    while True:
        rest = {
            op.name
            for op in program.ops
            if isinstance(op, Add)
            and op.name in int8
            and not all(_is_int8(program, t, int8) for t in op.inputs)
        }
        if not rest:
            break
        int8 -= rest
    ops = tuple(
        replace(
            op,
            precision='int8' if op.name in int8 else 'fp16',
            output_precision='int8' if _is_int8(program, op.output, int8) else 'fp16',
        )
        if isinstance(op, (SparseConv, Add))
        else op
        for op in program.ops
    )
    program = replace(program, ops=ops)
    _refuse_unequal(program)
    return replace(program, ops=tuple(_with_known_ranges(program, op) for op in ops))


def _rounding_itself(op: Op) -> Op:
    return replace(op, precision='int8') if isinstance(op, SparseConv) and _ranged(op) else op


def _ranged(op: Op) -> bool:
    if isinstance(op, SparseConv):
        return op.input_range is not None
    return isinstance(op, Add) and None not in op.ranges


def _is_int8(program: Program, tensor: str, int8: set[str]) -> bool:
    readers = program.readers(tensor)
    return tensor != program.input and bool(readers) and all(op.name in int8 for op in readers)


def _refuse_unequal(program: Program) -> None:
    for tensor, ranges in conflicts(program).items():
        readers = [getattr(r, 'layer', r.name) for r in program.readers(tensor)]
        raise ExportError(
            f'{", ".join(readers)} read one tensor with unequal ranges {ranges}; libspconv knows '
            'one per tensor: calibrate the whole model'
        )


def _with_known_ranges(program: Program, op: Op) -> Op:
    def known(tensor: str) -> float | None:
        return next(iter(program.ranges(tensor)), None)

    if isinstance(op, SparseConv) and op.precision == 'fp16':
        return replace(op, input_range=known(op.inputs[0]))
    if isinstance(op, Add) and op.precision == 'fp16':
        return replace(op, ranges=(known(op.inputs[0]), known(op.inputs[1])))
    return op
