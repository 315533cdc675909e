"""What NVIDIA's compiler makes of a file, beside what the linter says of it."""

from __future__ import annotations

from mmdet3d_quant.check.lint import Finding, Graph, lint
from mmdet3d_quant.check.lint.effects import REFUSED
from mmdet3d_quant.check.lint.reformat import layers_behind
from mmdet3d_quant.engines.tensorrt_rtx import Compiled

#: The target whose effects are those of the compiler.
TARGET = 'tensorrt-rtx'
#: Types of the compiler that the linter tells apart.
_EIGHT_BITS = ('Int8', 'FP8')


def disagreements(graph: Graph, compiled: Compiled) -> list[str]:
    """Names what the compiler does otherwise than the linter says: a refusal, or a layer's type.

    Args:
        graph: The file, as the linter sees it; refusals are those of its rules for the compiler,
            whatever the target of the graph is.
        compiled: Verdict on the same file.

    Returns:
        list of sentences, layers in the order of the file; of a refused file no layers.

    Raises:
        ValueError: If the two are of different files.
    """
    refusing = refusing_rules(lint(graph.for_target(TARGET)))
    if not compiled.accepted:
        return [] if refusing else ['no rule of the linter says that the compiler refuses it']
    told = [f'{id} says that the compiler refuses it' for id in refusing]
    runs_in = {product.output: product.runs_in for product in compiled.products}
    for node in graph.layers():
        if node.output[0] not in runs_in:
            raise ValueError(f'{graph.name(node)} is no layer of the file that was compiled')
        here, there = graph.runs_in(node), runs_in[node.output[0]]
        if here != (there if there in _EIGHT_BITS else ''):
            types = f'{here.upper() or "float"} for the linter, {there or "left out"}'
            told.append(f'{graph.name(node)}: {types} for the compiler')
    return told


def refusing_rules(findings: list[Finding]) -> list[str]:
    """Lists the rules because of which the engine of a graph refuses it, each once."""
    return sorted({f.rule.id for f in findings if f.effect.what == REFUSED})


def beside(graph: Graph, finding: Finding, compiled: Compiled) -> str:
    """Tells what the compiler made of the layers that a finding is of.

    Args:
        graph: The file.
        finding: Of the graph: at a layer, or at what a layer reads.
        compiled: Verdict on the same file.

    Returns:
        ``refused``, or the types in which the layers run; empty if there are none.
    """
    if not compiled.accepted:
        return 'refused'
    runs_in = {product.output: product.runs_in for product in compiled.products}
    nodes = [n for n in graph if graph.name(n) == finding.node]
    made = [n for node in nodes for n in ([node] if graph.is_layer(node) else [])]
    made = made or [n for node in nodes for t in node.output for n in layers_behind(graph, t, 0)]
    types = (runs_in.get(node.output[0]) for node in made)
    return ', '.join(dict.fromkeys(type_ for type_ in types if type_))


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
