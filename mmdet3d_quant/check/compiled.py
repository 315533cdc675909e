"""What NVIDIA's compiler makes of a file, beside what the linter says of it."""

from __future__ import annotations

from collections.abc import Sequence

from mmdet3d_quant.check.lint.graph import LAYERS
from mmdet3d_quant.check.lint.layers import Layer
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines.tensorrt_rtx import Compiled


def disagreements(layers: Sequence[Layer], compiled: Compiled) -> list[str]:
    """Names the convolutions that run in another type than the linter says.

    Args:
        layers: Convolutions of the file, as the linter lists them.
        compiled: Verdict on the same file.

    Returns:
        list of sentences in the order of the file; empty if the file was refused.

    Raises:
        ValueError: If the two are of different files.
    """
    if not compiled.accepted:
        return []
    found = [product for product in compiled.products if product.op in LAYERS]
    return [
        f'{there.name}: INT8 for the linter, {there.runs_in or "left out"} for the compiler'
        if here.int8
        else f'{there.name}: float for the linter, INT8 for the compiler'
        for here, there in strict_zip(layers, found)
        if here.int8 != (there.runs_in == 'Int8')
    ]


def groups(verdicts: dict[str, Compiled]) -> list[tuple[str, Compiled]]:
    """Joins the GPU generations for which the compiler made the same of a file.

    Returns:
        list of names, such as ``SM86, SM89``, with the first verdict of each group.
    """
    joined: dict[tuple, list[Compiled]] = {}
    for verdict in verdicts.values():
        types = tuple(product.runs_in for product in verdict.products)
        same = (verdict.error, types, verdict.kernels, verdict.activation_bytes)
        joined.setdefault(same, []).append(verdict)
    return [(', '.join(v.sm for v in group), group[0]) for group in joined.values()]


def megabytes(verdict: Compiled) -> str:
    """Formats the bytes that the kernels of an engine write, in megabytes of 10**6."""
    written = verdict.activation_bytes
    return '?' if written is None else f'{written / 1e6:.1f}'
