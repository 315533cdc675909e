"""Comparison of a head with its file on equal queries: what chooses them is judged by itself.

A head makes a query of each of the highest cells of its heatmap. Where two are equal but for the
last bits, two correct runs choose others, and attention spreads that to all outputs. So a file is
asked which cells it chose; the choice must be the best of its own heatmap, the heatmap must be that
of torch, and torch computes the outputs of the same queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from mmdet3d_quant.engines import Arrays
from mmdet3d_quant.export.cuts import Cut

#: Name of the output that is no output of the file: class logits of all cells.
HEATMAP = 'dense_heatmap'
#: How far scores, which are between 0 and 1, of chosen and of best cells may be apart.
_TIE = 1e-6


@dataclass(frozen=True)
class Choice:
    """Tensors of a head's graph that tell how it chose its queries, by name.

    Attributes:
        logits: Heatmap before the sigmoid, (B, classes, X, Y).
        scores: Behind it.
        cells: Which were chosen, (B, P), counted over classes and cells.
    """

    logits: str
    scores: str
    cells: str


@dataclass(frozen=True)
class Queries:
    """Queries of one run.

    Attributes:
        peaks: Which cells are peaks, bool (B, classes, X * Y).
        cells: Which were chosen, int64 (B, P), counted over classes and cells.
    """

    peaks: Tensor
    cells: Tensor


@dataclass
class Seen:
    """What a head did in torch: its heatmap before the sigmoid, and its queries."""

    heatmap: np.ndarray = field(default_factory=lambda: np.empty(0))
    queries: Queries | None = None


def choice_in(cut: Cut, graph: onnx.ModelProto) -> Choice | None:
    """Finds in a file how it chooses queries.

    Args:
        cut: The cut that it was exported from.
        graph: The file.

    Returns:
        :class:`Choice`; None if the cut has no head that proposes, or the file no single TopK
        behind a Sigmoid.
    """
    best = [node for node in graph.graph.node if node.op_type == 'TopK']
    if not hasattr(getattr(cut.module, 'bbox_head', None), 'propose') or len(best) != 1:
        return None
    makers = {output: node for node in graph.graph.node for output in node.output}
    todo, seen = [best[0].input[0]], set()
    while todo:
        node = makers.get(todo.pop(0))
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.op_type == 'Sigmoid':
            return Choice(node.input[0], node.output[0], best[0].output[1])
        todo.extend(node.input)
    return None


def told(cut: Cut, choice: Choice, outputs: Arrays) -> tuple[Arrays, Queries, str]:
    """Takes the choice from what a graph of :func:`telling` gave.

    Returns:
        Tuple of the outputs by name, :data:`HEATMAP` among them; the queries, of torch where
        those of the graph cannot be; and what is wrong with the choice, or empty.
    """
    head: Any = cut.module.bbox_head
    result = {n: v for n, v in outputs.items() if n not in (choice.scores, choice.cells)}
    result[HEATMAP] = result.pop(choice.logits).astype(np.float32)
    scores = torch.as_tensor(outputs[choice.scores].astype(np.float32))
    cells = torch.as_tensor(outputs[choice.cells]).long()
    fault = choice_fault(head, scores, cells)
    peaks, best = head.propose(scores)
    return result, Queries(peaks > 0, best if fault else cells), fault


def telling(graph: onnx.ModelProto, choice: Choice) -> onnx.ModelProto:
    """Copies a graph with the tensors of its choice as outputs, too."""
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    known = {v.name: v for v in onnx.shape_inference.infer_shapes(graph).graph.value_info}
    kinds = {choice.cells: TensorProto.INT64}
    for name in (choice.logits, choice.scores, choice.cells):
        kind = known[name].type.tensor_type.elem_type if name in known else TensorProto.FLOAT
        value = helper.make_tensor_value_info(name, kinds.get(name, kind), None)
        result.graph.output.append(value)
    return result


def choice_fault(head: Any, scores: Tensor, cells: Tensor) -> str:
    """Describes what is wrong with the cells that a file chose by its own scores; empty if nothing.

    Args:
        head: The head.
        scores: By class and cell, (B, classes, X, Y).
        cells: int64 (B, P).
    """
    flat = scores.flatten(1)
    if bool((cells < 0).any()) or bool((cells >= flat.shape[1]).any()):
        return f'queries are chosen from outside of the map, which has {flat.shape[1]} cells'
    if any(len(row.unique()) < len(row) for row in cells):
        return 'one cell is chosen for several queries'
    peaks, best = head.propose(scores)
    if best.shape != cells.shape:
        return f'{cells.shape[1]} queries are chosen, not {best.shape[1]}'
    wanted, found = (peaks.flatten(1).gather(1, c).sort(dim=1).values for c in (best, cells))
    off = int(((wanted - found).abs() > _TIE).sum())
    return (
        f'{off} of {found.numel()} queries are not the highest peaks of the heatmap' if off else ''
    )


@contextmanager
def watched(cut: Cut, queries: Queries | None = None) -> Iterator[Seen]:
    """Watches the head of a cut in torch, on given queries or its own."""
    head: Any = cut.module.bbox_head
    seen, own = Seen(), head.propose

    def propose(scores: Tensor) -> tuple[Tensor, Tensor]:
        peaks, cells = own(scores)
        if queries is not None:
            peaks = scores.flatten(2) * queries.peaks.to(scores.device)
            cells = queries.cells.to(scores.device)
        seen.queries = Queries(peaks > 0, cells)
        return peaks, cells

    def look(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.heatmap = out.detach().cpu().numpy()

    hook = head.heatmap_head.register_forward_hook(look)
    vars(head)['propose'] = propose
    try:
        yield seen
    finally:
        del vars(head)['propose']
        hook.remove()
