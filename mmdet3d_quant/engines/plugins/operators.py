"""What a plugin's operator is, and a node of it that is ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdet3d_quant.engines.plugins.attributes import Field


@dataclass(frozen=True)
class Kind:
    """An operator.

    Attributes:
        run: Computes the outputs from attributes and inputs.
        inputs: A letter for each: f for numbers, i for indices.
        outputs: The same letter of each, and how many axes it has.
        fields: What its attributes may be.
        least: How many inputs it needs; None for all.
        check: Raises if attributes and the number of inputs do not fit.
    """

    run: Callable[[dict[str, Any], list[np.ndarray]], tuple[np.ndarray, ...]]
    inputs: str
    outputs: tuple[tuple[str, int], ...]
    fields: Mapping[str, Field]
    least: int | None = None
    check: Callable[[dict[str, Any], int], None] | None = None


class Operator:
    """A node with its attributes.

    Args:
        kind: Its operator.
        attributes: Its attributes, checked.
        name: What errors call it.
        failures: Where the first error is put; nothing runs after one.
    """

    def __init__(
        self, kind: Kind, attributes: dict[str, Any], name: str, failures: list[str]
    ) -> None:
        self.kind = kind
        self.attributes = attributes
        self.name = name
        self.failures = failures

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """Runs the node. Never raises: an exception in a PyOp ends the process.

        Args:
            arrays: float32 and int64, by the letters of the operator.

        Returns:
            Tuple of arrays, float32 and int32; empty ones if this or an earlier node failed.
        """
        if not self.failures:
            try:
                found = self.kind.run(self.attributes, list(arrays))
                types = {'f': np.float32, 'i': np.int32}
                return tuple(
                    np.ascontiguousarray(array, types[letter]).reshape(np.shape(array))
                    for array, (letter, _) in zip(found, self.kind.outputs)
                )
            except Exception as err:  # told once the run is over
                self.failures.append(f'{self.name}: {err or type(err).__name__}')
        types = {'f': np.float32, 'i': np.int32}
        return tuple(np.zeros((0,) * axes, types[letter]) for letter, axes in self.kind.outputs)
