"""Attributes of plugin nodes: which there are, what they may be, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Union

from onnx import NodeProto, helper

from mmdet3d_quant.engines.files import EngineError


@dataclass(frozen=True)
class Numbers:
    """What an attribute of numbers may be.

    Attributes:
        low: The least that each may be.
        high: The most.
        default: Value of a node without the attribute; None if the node must have it.
        count: How many there are; None for one that is no list.
        whole: Whether they are integers.
    """

    low: float
    high: float
    default: Any = None
    count: int | None = None
    whole: bool = True

    def wrong(self, value: Any) -> str | None:
        """Tells what is wrong with a value; None if nothing is."""
        count = len(value) if isinstance(value, (list, tuple)) else None
        values = [value] if count is None else value
        if count != self.count:
            return f'wanted is {"one number" if self.count is None else f"{self.count} numbers"}'
        if any(not isinstance(v, (int, float)) or self.whole and v != int(v) for v in values):
            return f'wanted are {"integers" if self.whole else "numbers"}'
        if not all(self.low <= v <= self.high for v in values):
            return f'wanted is {self.low:g} to {self.high:g}'
        return None


@dataclass(frozen=True)
class Words:
    """What an attribute of text may be.

    Attributes:
        choices: The words; any text if there are none.
        default: That of a node without the attribute.
    """

    choices: tuple[str, ...] = ()
    default: str = ''

    def wrong(self, value: Any) -> str | None:
        """Tells what is wrong with a value; None if nothing is."""
        if isinstance(value, str) and (not self.choices or value in self.choices):
            return None
        return f'wanted is {" or ".join(self.choices) or "text"}'


Field = Union[Numbers, Words]


def named(node: NodeProto) -> str:
    """The words by which errors call a node."""
    return f'node {node.name or node.output[0]!r} ({node.domain}::{node.op_type})'


def read_attributes(node: NodeProto, fields: Mapping[str, Field]) -> dict[str, Any]:
    """Reads the attributes of a node.

    Args:
        node: The node.
        fields: What its operator knows, by name.

    Returns:
        Dict of int, float, str or list by name, with the defaults of those that are not there.

    Raises:
        EngineError: If one is unknown, missing, or out of its bounds; names node and attribute.
    """
    given = {a.name: _value(a) for a in node.attribute}
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise EngineError(
            f'{named(node)} has the attribute {unknown[0]!r}, which is unknown here; known are '
            f'{", ".join(fields)}. Export for this version of the operator'
        )
    values = {}
    for name, field in fields.items():
        value = given.get(name, field.default)
        if value is None:
            raise EngineError(f'{named(node)} lacks the attribute {name!r}; export again')
        wrong = field.wrong(value)
        if wrong:
            raise EngineError(f'{named(node)} has {name} = {value!r:.80}; {wrong}')
        values[name] = value
    return values


def _value(attribute: Any) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode('utf-8', 'replace')
    return list(value) if isinstance(value, (list, tuple)) or hasattr(value, 'extend') else value
