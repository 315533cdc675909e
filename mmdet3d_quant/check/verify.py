"""Comparison of exported graphs with their torch models by SQNR."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx

from mmdet3d_quant.check.align import SPARE, align
from mmdet3d_quant.check.fit import Fit, range_fault, range_fits, worst_fits
from mmdet3d_quant.check.queries import HEATMAP, choice_in
from mmdet3d_quant.check.runs import run_torch, sqnr
from mmdet3d_quant.check.steps import Asked, ask
from mmdet3d_quant.engines import Arrays, Engine, ONNXRuntime, OpenVINO
from mmdet3d_quant.engines.plugins import plugin_nodes
from mmdet3d_quant.export.cuts import Cut
from mmdet3d_quant.export.pairs import ExportError
from mmdet3d_quant.export.targets import coding_of
from mmdet3d_quant.files.typed import is_strong

#: Least SQNR of an output where nothing is quantized.
FLOAT_DB = 60.0
#: The same of a head: where peaks are equal but for the last bit, engines look at other queries,
#: and attention spreads that to all.
QUERY_DB = 30.0
#: How much closer an output must be to another run than fake-quant is to float.
MARGIN_DB = 1.0
#: The same two of files typed FP16, and of those with plugins that keep FP16, which carry its
#: roundings from layer to layer: what they add may be as large as twice what quantization costs.
HALF_DB, HALF_MARGIN_DB = 40.0, -3.0
#: Least SQNR of an output of fake-quant against float: below, the error is half of the signal.
COLLAPSED_DB = 6.0


@dataclass(frozen=True)
class Agreement:
    """Signal-to-quantization-noise ratios of one output, in dB.

    Attributes:
        cut: Name of the cut.
        output: Name of the output.
        fake_quant: Torch fake-quant against torch float: what quantization costs.
        onnxruntime: ONNX Runtime against the torch model that was exported; None for the LiDAR
            encoder's file, which it does not read.
        openvino: The same of OpenVINO; None for a file with plugin nodes, which it does not run.
        int8_convs: Convolutions that OpenVINO or libspconv runs in INT8.
        all_convs: All convolutions of the graph there; 0 if neither runs it.
        fault: Description of what is wrong with the output, or empty.
        libspconv: What libspconv computes, in torch, against the torch model; None for other files.
    """

    cut: str
    output: str
    fake_quant: float
    onnxruntime: float | None
    openvino: float | None
    int8_convs: int
    all_convs: int
    fault: str = ''
    libspconv: float | None = None


def verify(
    cut: Cut, path: str | Path, quantized: bool = True, real: bool = True
) -> list[Agreement]:
    """Compares an exported file with its model on the example inputs.

    A head is compared on the queries that the file chose, its heatmap and its choice by themselves;
    see :mod:`mmdet3d_quant.check.queries`.

    Args:
        cut: The cut, its module in eval mode on the CPU.
        path: The file exported from it.
        quantized: Whether the file has Q/DQ nodes.
        real: Whether the inputs are data; else ranges, which are of data, are not judged by them.

    Returns:
        List of :class:`Agreement`, one per output, and of a head one of its heatmap.

    Raises:
        ExportError: If the file has other outputs than the cut.
    """
    mode, graph = 'quant' if quantized else 'float', onnx.load(str(path))
    plugins = bool(plugin_nodes(graph))
    engine = None if plugins else OpenVINO(path)
    convs = engine.int8_convolutions() if engine else (0, 0)
    choice, half = choice_in(cut, graph), plugins or is_strong(graph)
    if choice is None:
        arrays = {n: t.cpu().numpy() for n, t in cut.inputs.items()}
        expected, plain = run_torch(cut, mode), run_torch(cut, 'float')
        found = {'ONNX Runtime': ONNXRuntime(path)(arrays)}
        if engine:
            found['OpenVINO'] = engine(arrays)
        runs = {name: Asked(outputs, expected, plain) for name, outputs in found.items()}
    else:
        makers: dict[str, Callable[[Path], Engine]] = {'ONNX Runtime': ONNXRuntime}
        if engine:
            makers['OpenVINO'] = OpenVINO
        runs = {name: ask(cut, graph, choice, make, mode) for name, make in makers.items()}
    for run in runs.values():
        require_outputs(cut, path, run.outputs)
    results = []
    fits = range_fits(cut) if quantized and real else {}
    spare = SPARE if half else 0
    aligned = {
        name: run.outputs if choice else align(run.expected, run.outputs, spare)
        for name, run in runs.items()
    }
    for name in cut.output_names if choice is None else (HEATMAP, *cut.output_names):
        first = runs['ONNX Runtime']
        cost = sqnr(first.plain[name], first.expected[name])
        closeness = {e: sqnr(run.expected[name], aligned[e][name]) for e, run in runs.items()}
        least = least_of(cost, () if choice else cut.output_names, half)
        fault = nonfinite('torch', name, first.expected[name])
        for at, value in closeness.items():
            run = runs[at]
            fault = fault or (run.fault and f'{at}: {run.fault}')
            fault = fault or output_fault(at, name, value, least, aligned[at][name])
            if fault:
                own = {n: run.expected[n] for n in cut.output_names}
                fault += swapped(name, own, run.outputs, cost, half)
                break
        fault = fault or cost_fault(name, cost, fits)
        results.append(
            Agreement(
                cut.name,
                name,
                cost,
                closeness['ONNX Runtime'],
                closeness.get('OpenVINO'),
                *convs,
                fault,
            )
        )
    return results


def cost_fault(name: str, cost: float, fits: Mapping[str, Fit]) -> str:
    """Describes what quantization itself spoils: ranges that do not fit, else the output.

    Args:
        name: Name of the output.
        cost: SQNR of fake-quant against float, in dB.
        fits: Of the quantizers, from ``check.fit``.

    Returns:
        Str, empty if nothing is spoiled.
    """
    ranges = range_fault(fits)
    if ranges or not fits or cost >= COLLAPSED_DB:
        return ranges
    return (
        f'{name} of fake-quant agrees with float to {cost:.1f} dB only (least: '
        f'{COLLAPSED_DB:.0f} dB); ranges that fit worst: {worst_fits(fits)}'
    )


def require_outputs(cut: Cut, path: str | Path, outputs: Arrays) -> None:
    """Checks that a file has the outputs of its cut, by name; an engine may give aliases, too.

    Raises:
        ExportError: If it has not.
    """
    if not outputs.keys() >= set(cut.output_names):
        raise ExportError(
            f'{Path(path).name} has the outputs {", ".join(outputs)} where {cut.name} has '
            f'{", ".join(cut.output_names)}: export again'
        )


def nonfinite(where: str, name: str, value: np.ndarray) -> str:
    """Describes what is not finite in an output; empty if nothing is."""
    odd = int((~np.isfinite(value)).sum())
    return f'{where}: {odd} of {value.size} values of {name} are NaN or infinite' if odd else ''


def output_fault(where: str, name: str, value: float, least: float, found: np.ndarray) -> str:
    """Describes why an output of an engine cannot be right.

    Args:
        where: Name of the engine.
        name: Name of the output.
        value: Its SQNR against torch, in dB.
        least: What it must be at least, of :func:`least_of`.
        found: The output.

    Returns:
        Str, empty if it can.
    """
    odd = nonfinite(where, name, found)
    if odd or value >= least:
        return odd
    return f'{where}: {name} agrees with torch to {value:.1f} dB (least: {least:.1f} dB)'


def least_of(cost: float, names: Collection[str], half: bool = False) -> float:
    """Computes the least SQNR of an output.

    Args:
        cost: What quantization costs, in dB; NaN counts as nothing.
        names: Names of all outputs of the cut.
        half: Whether the file is typed FP16.

    Returns:
        Float, dB.
    """
    most, margin = (HALF_DB, HALF_MARGIN_DB) if half else (FLOAT_DB, MARGIN_DB)
    most = most if coding_of(names) is None else QUERY_DB
    return most if math.isnan(cost) else min(cost + margin, most)


def swapped(name: str, expected: Arrays, found: Arrays, cost: float, half: bool = False) -> str:
    """Tells which other output holds what an output should, if two have changed places.

    Args:
        name: The output that is wrong.
        expected: Outputs of torch, by name.
        found: Those of the engine, as it gave them.
        cost: As for :func:`least_of`.
        half: Likewise.

    Returns:
        Str, empty if none does.
    """
    for a, b in combinations(expected, 2):
        if name in (a, b) and expected[a].shape == expected[b].shape:
            back = align(expected, {**found, a: found[b], b: found[a]}, SPARE if half else 0)
            if all(sqnr(expected[n], back[n]) >= least_of(cost, expected, half) for n in (a, b)):
                return f'; {a} and {b} are swapped'
    return ''


def require_agreement(results: Iterable[Agreement]) -> None:
    """Refuses files with a fault.

    Raises:
        ExportError: If an output has one.
    """
    faults = dict.fromkeys(f'{r.cut}.onnx: {r.fault}' for r in results if r.fault)
    if faults:
        raise ExportError(
            '\n'.join(faults) + '\nNothing was written. To look into the files, write them with '
            '--no-verify and run tools/parity.py'
        )
