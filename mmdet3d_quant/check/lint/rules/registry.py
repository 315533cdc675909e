"""Registry of the rules, and the check of a graph against them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, Tuple

from onnx import NodeProto

from mmdet3d_quant.check.lint.graph import Graph

#: Where, and what exactly.
Found = Iterator[Tuple[NodeProto, str]]


@dataclass(frozen=True)
class Rule:
    """One thing that goes wrong.

    Attributes:
        id: For ``--ignore`` and for looking up.
        title: What is wrong.
        why: What it costs.
        mend: What to do.
        check: Finds it.
        floats: Whether it is wrong in a float graph, too.
    """

    id: str
    title: str
    why: str
    mend: str
    check: Callable[[Graph], Found]
    floats: bool = False


@dataclass(frozen=True)
class Finding:
    """A rule that a node breaks.

    Attributes:
        rule: The rule.
        node: Name of the node.
        detail: Numbers and names.
    """

    rule: Rule
    node: str
    detail: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        r = self.rule
        return dict(
            id=r.id, node=self.node, title=r.title, detail=self.detail, why=r.why, mend=r.mend
        )


RULES: list[Rule] = []


def lint(graph: Graph, ignore: Iterable[str] = ()) -> list[Finding]:
    """Checks a graph against all rules.

    Args:
        graph: The graph.
        ignore: Ids of rules to leave out.

    Returns:
        Findings by rule, then in the order of the file. A graph without any Q/DQ, which may well be
        meant as a float one, is checked against the rules of float graphs only.

    Raises:
        ValueError: If an id is unknown.
    """
    ignored = set(ignore)
    unknown = ignored - {rule.id for rule in RULES}
    if unknown:
        raise ValueError(f'there is no rule {sorted(unknown)[0]}')
    quantized = is_quantized(graph)
    return [
        Finding(rule, graph.name(node), detail)
        for rule in RULES
        if rule.id not in ignored and (quantized or rule.floats)
        for node, detail in rule.check(graph)
    ]


def is_quantized(graph: Graph) -> bool:
    """Whether there is any Q or DQ."""
    return any(True for _ in graph.of('QuantizeLinear', 'DequantizeLinear'))


def rule(id: str, title: str, why: str, mend: str, floats: bool = False) -> Callable:
    """Registers a check as a rule.

    Raises:
        ValueError: If there is a rule of that id.
    """
    if any(known.id == id for known in RULES):
        raise ValueError(f'there is a rule {id} already')

    def register(check: Callable[[Graph], Found]) -> Callable[[Graph], Found]:
        RULES.append(Rule(id, title, why, mend, check, floats))
        return check

    return register
