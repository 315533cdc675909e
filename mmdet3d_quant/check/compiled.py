"""What NVIDIA's compiler makes of a file, beside what the linter says of it."""

from __future__ import annotations

from mmdet3d_quant.check.lint import Graph
from mmdet3d_quant.engines.tensorrt_rtx import Compiled


def disagreements(graph: Graph, compiled: Compiled) -> list[str]:
    """Names the layers that run in another type than the linter says.

    Args:
        graph: The file, as the linter sees it.
        compiled: Verdict on the same file.

    Returns:
        list of sentences in the order of the file; empty if the file was refused.

    Raises:
        ValueError: If the two are of different files.
    """
    if not compiled.accepted:
        return []
    runs_in = {product.output: product.runs_in for product in compiled.products}
    told = []
    for node in graph.layers():
        if node.output[0] not in runs_in:
            raise ValueError(f'{graph.name(node)} is no layer of the file that was compiled')
        here, there = graph.is_int8(node), runs_in[node.output[0]]
        if here != (there == 'Int8'):
            types = f'{"INT8" if here else "float"} for the linter, {there or "left out"}'
            told.append(f'{graph.name(node)}: {types} for the compiler')
    return told


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
