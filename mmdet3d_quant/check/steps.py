"""One step of the ladder: a cut run whole and with its points replaced, in torch or an engine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from mmdet3d_quant.check.probes import cut_at_points, output_point, torch_points
from mmdet3d_quant.check.queries import HEATMAP, Choice, Queries, telling, told, watched
from mmdet3d_quant.check.runs import run_torch
from mmdet3d_quant.engines import Arrays, Engine
from mmdet3d_quant.export.cuts import Cut


@dataclass(frozen=True)
class Run:
    """Results of one step.

    Attributes:
        outputs: Outputs by name, with no point replaced; of a head its heatmap, too.
        layers: Tensor that arrives at each point, by point, with all points replaced.
        queries: Queries of a head in the first run, and in the second.
        part: The cut that torch ran; None in an engine.
        fault: What is wrong with the queries, or empty.
    """

    outputs: Arrays
    layers: Arrays
    queries: tuple[Queries, ...] = ()
    part: Cut | None = None
    fault: str = ''


@dataclass(frozen=True)
class Asked:
    """One run of an engine, and torch on the queries that the engine chose.

    Attributes:
        outputs: Outputs of the engine by name, of a head its heatmap, too.
        expected: Those of torch in the mode of the file.
        plain: Those of torch in float.
        fault: What is wrong with the choice, or empty.
    """

    outputs: Arrays
    expected: Arrays
    plain: Arrays
    fault: str = ''


def torch_run(
    cut: Cut, mode: str, fed: Arrays, choice: Choice | None, queries: Sequence[Queries] = ()
) -> Run:
    """Runs a cut in torch.

    Args:
        cut: The cut.
        mode: Mode of its quantizers.
        fed: Arrays by point, which replace what arrives there in the second run; without any there
            is no second run.
        choice: How the file of a head chooses queries.
        queries: Queries of another run, which the head shall take.
    """
    if choice is None:
        arrived = torch_points(cut, mode, fed, outputs=True) if fed else {}
        return Run(run_torch(cut, mode), arrived, part=cut)
    with watched(cut, *queries[:1]) as seen:
        outputs = {**run_torch(cut, mode), HEATMAP: seen.heatmap}
    if not fed:
        return Run(outputs, {}, tuple(filter(None, [seen.queries])), cut)
    with watched(cut, *queries[1:]) as again:
        arrived = torch_points(cut, mode, fed, outputs=True)
    arrived[output_point(HEATMAP)] = again.heatmap
    return Run(outputs, arrived, tuple(filter(None, [seen.queries, again.queries])), cut)


def engine_run(
    make: Callable[[Path], Engine],
    graph: onnx.ModelProto,
    cut: Cut,
    fed: Arrays,
    choice: Choice | None,
) -> Run:
    """Runs a graph in an engine; as :func:`torch_run` does, with the queries that it chooses."""
    inputs = {n: t.cpu().numpy() for n, t in cut.inputs.items()}
    graph = graph if choice is None else telling(graph, choice)
    pieces: Arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f'{cut.name}.onnx'
        onnx.save(graph, str(file))
        outputs = make(file)(inputs)
        if fed:
            cutting, replaced, arriving = cut_at_points(graph, fed)
            onnx.save(cutting, str(file))
            given = {name: fed[point] for name, point in replaced.items()}
            pieces = make(file)({**inputs, **given})
    if choice is None:
        return Run(outputs, {p: pieces[t] for p, t in arriving.items()} if fed else {})
    outputs, first, fault = told(cut, choice, outputs)
    if not fed:
        return Run(outputs, {}, (first,), fault=fault)
    layers = {p: pieces[t] for p, t in arriving.items()}
    chosen, second, odd = told(cut, choice, pieces)
    layers[output_point(HEATMAP)] = chosen[HEATMAP]
    return Run(outputs, layers, (first, second), fault=fault or odd)


def ask(
    cut: Cut, graph: onnx.ModelProto, choice: Choice, make: Callable[[Path], Engine], mode: str
) -> Asked:
    """Runs a file that also says what it chose, and torch on the same queries.

    Args:
        cut: The cut, its module in eval mode on the CPU.
        graph: The file.
        choice: How it chooses.
        make: Constructor of the engine.
        mode: Mode of the quantizers that the file has.
    """
    run = engine_run(make, graph, cut, {}, choice)
    expected, plain = (torch_run(cut, m, {}, choice, run.queries).outputs for m in (mode, 'float'))
    return Asked(run.outputs, expected, plain, run.fault)
