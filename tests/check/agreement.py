"""One graph, judged by the linter and by NVIDIA's compiler."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from mmdet3d_quant.check.compiled import TARGET, disagreements
from mmdet3d_quant.check.lint import Graph, lint
from mmdet3d_quant.check.lint.effects import NOTHING, SLOWER
from mmdet3d_quant.engines.tensorrt_rtx import compile_onnx
from tests.check.generated import generate
from tests.check.planted import PLANTED
from tests.engines.qdq import QDQ

SM = 'SM86'
#: The first generation that runs FP8.
SM_FP8 = 'SM89'
#: Channels, and whether the graph is typed FP16.
KINDS = [(8, False), (8, True), (32, False), (32, True)]


@dataclass(frozen=True)
class Outcome:
    """What the two say of a graph.

    Attributes:
        found: Rules and cases that the linter finds.
        effects: What it says that happens.
        told: Disagreements in words.
        accepted: Whether the compiler takes the graph.
        layers: Products by the compiler's count, and those in INT8.
        cost: Kernels, and bytes that they write; empty of a graph that is refused.
        version: Of the compiler.
    """

    found: frozenset[tuple[str, str]]
    effects: frozenset[str]
    told: tuple[str, ...]
    accepted: bool
    layers: tuple[int, int]
    cost: tuple[int, int] | tuple[()]
    version: str

    @property
    def rules(self) -> set[str]:
        return {rule for rule, _ in self.found}


def judge(model: onnx.ModelProto, path: Path) -> Outcome:
    """Judges a graph, which is written to ``path``."""
    onnx.save(model, path)
    graph = Graph(model, TARGET)
    findings = lint(graph)
    sm = (
        SM_FP8 if TensorProto.FLOAT8E4M3FN in {i.data_type for i in model.graph.initializer} else SM
    )
    verdict = compile_onnx(path, [sm])[sm]
    return Outcome(
        frozenset((f.rule.id, f.case) for f in findings),
        frozenset(f.effect.what for f in findings),
        tuple(disagreements(graph, verdict)),
        verdict.accepted,
        (len(verdict.products), verdict.int8),
        (verdict.kernels, verdict.activation_bytes or 0) if verdict.accepted else (),
        verdict.version,
    )


def plant(name: str, wrong: bool, channels: int, half: bool) -> onnx.ModelProto:
    """Builds a planted case, or its clean twin."""
    case, g = PLANTED[name], QDQ(channels=channels, half=half)
    output = case.build(g, wrong)
    return g.model(output, case.opset or None)


def grow(seed: int) -> onnx.ModelProto:
    """Builds a random graph; widths and types take turns."""
    g, output = generate(seed, *KINDS[seed % len(KINDS)])
    return g.model(output)


def costs(wrong: Outcome, clean: Outcome, effect: str) -> bool | None:
    """Tells whether the costs of a defect are as its effect says; None if it says nothing."""
    if effect not in (NOTHING, SLOWER) or not (wrong.cost and clean.cost):
        return None
    more = any(a > b for a, b in zip(wrong.cost, clean.cost))
    return more == (effect == SLOWER)


def kinds(name: str) -> list[tuple[int, bool]]:
    """Lists the widths and types in which a case is planted."""
    return [kind for kind in KINDS if kind[1] in PLANTED[name].typed]
