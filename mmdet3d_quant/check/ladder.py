"""Parity ladder: finds the step from float model to engine, and the layer, where results diverge.

The steps are float, fake-quant, reloaded, folded, one per engine, and FP16, where every tensor
outside of Q/DQ pairs is rounded to FP16, as engines of the file's target may. From fake-quant on
all of them should compute the same. Two checks are made:

* Outputs. A rounding tie that falls the other way in one layer spreads in a deep network (see
  docs/design.md), so two correct runs differ there, but by less than quantization costs: an output
  must be closer to the step before than fake-quant is to float.
* Each layer alone. The input of each activation quantizer is replaced by that of fake-quant, so
  that differences do not spread, and the tensor that arrives at it is compared. Correct layers
  agree to :data:`LAYER_DB` or better; a layer with a scale that is 5 % off does not. A layer
  across a quantizer that was not found in the file is not judged alone.

A head of any step is compared with the one that torch ran last, on the queries of that step; see
:mod:`mmdet3d_quant.check.queries`.

At fake-quant itself the range of each quantizer is held against its tensor.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from mmdet3d_quant.check.align import SPARE, align
from mmdet3d_quant.check.fit import range_fits
from mmdet3d_quant.check.probes import makers_of, output_point, points_of, torch_points
from mmdet3d_quant.check.queries import HEATMAP, Choice, choice_in, telling
from mmdet3d_quant.check.runs import sqnr
from mmdet3d_quant.check.steps import Run, engine_run, torch_run
from mmdet3d_quant.check.verify import cost_fault, least_of, nonfinite, require_outputs, swapped
from mmdet3d_quant.engines import Arrays, Engine, ONNXRuntime
from mmdet3d_quant.export.cuts import Cut
from mmdet3d_quant.export.half import LARGEST, beyond, round_half
from mmdet3d_quant.export.ranges import peaks
from mmdet3d_quant.export.targets import target_in, target_of
from mmdet3d_quant.files.typed import is_strong, to_float32
from mmdet3d_quant.layers.fold import fold_bn

#: Least SQNR of a layer with equal inputs. Correct layers reach 67 dB or more, even with a weight
#: on a rounding tie that folding or an engine rounds the other way.
LAYER_DB = 55.0
#: The same where tensors are rounded to FP16, which moves values across ties: 46 dB is seen.
HALF_LAYER_DB = 40.0
#: Name of the step where they are.
HALF = 'FP16'


@dataclass(frozen=True)
class Rung:
    """One step of one cut.

    Attributes:
        cut: Name of the cut.
        stage: ``float``, ``fake-quant``, ``reloaded``, ``folded``, an engine or ``FP16``.
        to_previous: SQNR of every output against the step before, in dB.
        to_float: SQNR of every output against float, in dB.
        layers: SQNR of every layer with equal inputs, in dB, by the point that its output arrives
            at, in the order of the graph; empty where nothing is quantized.
        points: Quantizers of activations whose inputs were replaced, and all that were called.
        missing: Names of the others, which were not found in the file.
        fault: Description of the fault, or empty.
    """

    cut: str
    stage: str
    to_previous: dict[str, float] = field(default_factory=dict)
    to_float: dict[str, float] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)
    points: tuple[int, int] = (0, 0)
    missing: tuple[str, ...] = ()
    fault: str = ''

    def as_dict(self) -> dict[str, Any]:
        """Converts to plain values."""
        return asdict(self)


def climb(
    cut: Cut,
    reloaded: nn.Module,
    path: str | Path,
    engines: dict[str, Callable[[Path], Engine]],
    quantized: bool = True,
    tell: Callable[[str], None] = lambda stage: None,
    real: bool = True,
) -> list[Rung]:
    """Runs one cut through all steps.

    Args:
        cut: The cut, its module in eval mode on the CPU.
        reloaded: The same part of a detector that was built anew and loaded from a file.
        path: The file exported from the cut.
        engines: Constructors of engines by name, in the order of the steps.
        quantized: Whether the file has Q/DQ nodes.
        tell: Called with the name of every step before it runs.
        real: Whether the inputs are data; else ranges, which are of data, are not judged by them.

    Returns:
        List of :class:`Rung`, one per step, with and without faults.

    Raises:
        ExportError: If the file has other outputs than the cut.
    """
    mode = 'quant' if quantized else 'float'
    tell('float')
    rungs = [Rung(cut.name, 'float')]
    graph = onnx.load(str(path))
    fed = torch_points(cut, mode) if quantized else {}
    choice = choice_in(cut, graph)
    makers, across = _makers(graph, fed, choice)
    there = set(points_of(graph, fed).values())
    missing = tuple(point for point in fed if point not in there)

    def in_torch(module: nn.Module) -> Run:
        return torch_run(replace(cut, module=module), mode, fed, choice)

    def folded() -> nn.Module:
        module = copy.deepcopy(reloaded)
        return fold_bn(module, lambda m: m(*cut.inputs.values()))

    steps: dict[str, Callable[[], Run]] = {
        'fake-quant': lambda: in_torch(cut.module),
        'reloaded': lambda: in_torch(reloaded),
        'folded': lambda: in_torch(folded()),
    }
    if not quantized:
        steps.pop('fake-quant')
    strong, target = is_strong(graph), target_of(target_in(graph))
    plain = to_float32(graph) if strong else graph
    for name, make in engines.items():
        steps[name] = partial(engine_run, make, plain, cut, fed, choice)
    if strong or (target.half and not target.strong):
        half = graph if strong else round_half(graph)
        steps[HALF] = partial(engine_run, ONNXRuntime, half, cut, fed, choice)

    last, cost = torch_run(cut, 'float', {}, choice), {}
    first, (judge, judging) = last.outputs, (cut, 'float')
    names = cut.output_names if choice is None else (HEATMAP, *cut.output_names)
    for stage, step in steps.items():
        tell(stage)
        run = step()
        require_outputs(cut, path, run.outputs)
        spare = SPARE if stage == HALF else 0
        raw = run.outputs
        if choice is None:
            run = replace(run, outputs=align(first, raw, spare))
        else:  # what torch computes of the same queries
            last = torch_run(judge, judging, fed if judging == mode else {}, choice, run.queries)
            first = torch_run(cut, 'float', {}, choice, run.queries[:1]).outputs
        to_previous = {n: sqnr(last.outputs[n], run.outputs[n]) for n in names}
        to_float = {n: sqnr(first[n], run.outputs[n]) for n in names}
        alone = [n for n in makers if n in last.layers and n in run.layers and n not in across]
        layers = {n: sqnr(last.layers[n], run.layers[n]) for n in alone}
        at_engine = stage in (*engines, HALF)
        if stage == 'fake-quant':
            cost = to_previous
            odd = (nonfinite('torch', n, v) for n, v in run.outputs.items())
            fits = range_fits(cut) if real else {}
            spoiled = (cost_fault(n, c, fits) for n, c in cost.items())
            fault = next(filter(None, (*odd, *spoiled)), '')
        else:
            fault = run.fault or _fault(
                to_previous,
                layers,
                cost,
                makers,
                len(missing),
                {n: last.outputs[n] for n in cut.output_names},
                raw,
                HALF_LAYER_DB if stage == HALF else LAYER_DB,
                stage == HALF or (strong and at_engine),
            )
            if stage == HALF and not strong:
                fault = _overflow(fault, plain, cut)
        points = (len(fed) - len(missing) * at_engine, len(fed))
        lost = missing if at_engine else ()
        rungs.append(Rung(cut.name, stage, to_previous, to_float, layers, points, lost, fault))
        last = run
        judge, judging = (run.part, mode) if run.part else (judge, judging)
    return rungs


def _makers(
    graph: onnx.ModelProto, fed: Arrays, choice: Choice | None
) -> tuple[dict[str, list[str]], set[str]]:
    """Lists layers by point, as ``makers_of`` does; the heatmap of a head is an output, too."""
    if choice is None:
        return makers_of(graph, fed)
    makers, across = makers_of(telling(graph, choice), fed)
    for name in (choice.scores, choice.cells):
        makers.pop(output_point(name))
    logits = output_point(choice.logits)
    return {output_point(HEATMAP) if p == logits else p: m for p, m in makers.items()}, across


def _fault(
    outputs: dict[str, float],
    layers: dict[str, float],
    cost: dict[str, float],
    makers: dict[str, list[str]],
    missing: int,
    expected: Arrays,
    found: Arrays,
    limit: float,
    half: bool,
) -> str:
    """Describes the first layer, else the first output, below its limit; empty if none is."""
    for name, value in layers.items():
        if not value >= limit:  # NaN is off too
            made = ', '.join(makers[name]) or 'no layer'  # each of them found in the file
            return f'{made}: {value:.1f} dB in {name}, with equal inputs (least: {limit:.0f} dB)'
    for name, value in outputs.items():
        paid = cost.get(name, math.inf)
        least = least_of(paid, () if HEATMAP in outputs else outputs, half)
        if not value >= least:
            where = 'no layer by itself, only the whole' if layers else 'somewhere in the graph'
            if missing:
                where = f'somewhere in the graph, of which {missing} quantizer(s) were not found'
            odd = nonfinite('engine', name, found[name]) and ', NaN or infinite'
            return (
                f'{where}: {value:.1f} dB in output {name}{odd} (least: {least:.1f} dB)'
                + swapped(name, expected, found, paid, half)
            )
    return ''


def _overflow(fault: str, graph: onnx.ModelProto, cut: Cut) -> str:
    """Adds the stored number, or else the first tensor, that FP16 cannot hold.

    A tensor is no fault by itself: it may be a mask, or limited by what reads it.
    """
    stored = [f'{node.name or node.op_type}: {what}' for node, what in beyond(graph.graph)]
    if fault and not stored:
        sizes = peaks(graph, {n: t.cpu().numpy() for n, t in cut.inputs.items()})
        stored = [f'{n} reaches {size:.3g}' for n, size in sizes.items() if not size <= LARGEST]
    return '; '.join(
        filter(None, (fault, *(f'{s}; FP16 ends at {LARGEST:.0f}' for s in stored[:1])))
    )


def missing_points(rungs: Sequence[Rung]) -> list[str]:
    """Describes, by file, the quantizers that were not found in it."""
    texts = {}
    for rung in rungs:
        if rung.missing:
            names = ', '.join(rung.missing[:3]) + (', ...' if rung.missing[3:] else '')
            texts[rung.cut] = (
                f'{rung.cut}: {rung.points[0]} of {rung.points[1]} quantizers were found in the '
                f'file; layers across the others are not judged alone: {names}'
            )
    return list(texts.values())


def first_fault(rungs: Sequence[Rung]) -> Rung | None:
    """Finds the rung with a fault at the earliest step; None without faults."""
    order = list(dict.fromkeys(r.stage for r in rungs))
    return min((r for r in rungs if r.fault), key=lambda r: order.index(r.stage), default=None)
