"""Registry of the rules, and the check of a graph against them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, Tuple

from onnx import NodeProto

from mmdet3d_quant.check.lint.effects import NOTE, Effect
from mmdet3d_quant.check.lint.graph import Graph
from mmdet3d_quant.check.lint.rules.effects import EFFECTS

#: Where, what exactly, and which case of the rule it is; ``''`` for a rule that has one only.
Found = Iterator[Tuple[NodeProto, str, str]]


@dataclass(frozen=True)
class Rule:
    """One thing that goes wrong.

    Attributes:
        id: For ``--ignore`` and for looking up.
        title: What is wrong.
        why: What it costs.
        mend: What to do.
        check: Finds it.
        effects: What engines do then, by case and by the name of the target.
        floats: Whether it is wrong in a float graph, too.
    """

    id: str
    title: str
    why: str
    mend: str
    check: Callable[[Graph], Found]
    effects: dict[str, dict[str, Effect]]
    floats: bool = False


@dataclass(frozen=True)
class Finding:
    """A rule that a node breaks.

    Attributes:
        rule: The rule.
        node: Name of the node.
        detail: Numbers and names.
        case: Which way it breaks the rule; empty if there is one only.
        effect: What the engine does that the graph is for.
    """

    rule: Rule
    node: str
    detail: str
    case: str
    effect: Effect

    @property
    def severity(self) -> str:
        """``error``, ``warning``, or ``note`` for what costs nothing."""
        return self.effect.severity

    @property
    def counts(self) -> bool:
        """Whether it is more than a note."""
        return self.severity != NOTE

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        r, told = self.rule, dict(case=self.case, effect=self.effect.what, seen=self.effect.seen)
        return dict(
            id=r.id,
            node=self.node,
            title=r.title,
            detail=self.detail,
            **told,
            severity=self.severity,
            why=r.why,
            mend=r.mend,
        )


RULES: list[Rule] = []


def lint(graph: Graph, ignore: Iterable[str] = ()) -> list[Finding]:
    """Checks a graph against all rules.

    Args:
        graph: The graph.
        ignore: Ids of rules to leave out.

    Returns:
        Findings by rule, then in the order of the file; notes, too. A graph without any Q/DQ,
        which may well be meant as a float one, is checked against the rules of float graphs only.

    Raises:
        ValueError: If an id is unknown.
    """
    ignored = set(ignore)
    unknown = ignored - {rule.id for rule in RULES}
    if unknown:
        raise ValueError(f'there is no rule {sorted(unknown)[0]}')
    quantized, target = is_quantized(graph), graph.profile.name
    return [
        Finding(rule, graph.name(node), detail, case, rule.effects[case][target])
        for rule in RULES
        if rule.id not in ignored and (quantized or rule.floats)
        for node, detail, case in rule.check(graph)
        if target in rule.effects[case]
    ]


#: Operators that compute with integers, and round while they run.
INTEGER_OPS = ('ConvInteger', 'MatMulInteger', 'QLinearConv', 'QLinearMatMul')
DYNAMIC_OPS = ('DynamicQuantizeLinear',)


def is_quantized(graph: Graph) -> bool:
    """Whether there is any Q or DQ, or an operator that computes with integers."""
    quantizing = ('QuantizeLinear', 'DequantizeLinear', *INTEGER_OPS, *DYNAMIC_OPS)
    return any(True for _ in graph.of(*quantizing))


def rule(id: str, title: str, why: str, mend: str, floats: bool = False) -> Callable:
    """Registers a check as a rule.

    Raises:
        ValueError: If there is a rule of that id, or no effects of it are known.
    """
    if any(known.id == id for known in RULES):
        raise ValueError(f'there is a rule {id} already')
    if id not in EFFECTS:
        raise ValueError(f'rules/effects.py does not say what engines do about {id}')

    def register(check: Callable[[Graph], Found]) -> Callable[[Graph], Found]:
        RULES.append(Rule(id, title, why, mend, check, EFFECTS[id], floats))
        return check

    return register
