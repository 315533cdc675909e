"""What a plugin's operator is, and a node of it that runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines.files import EngineError
from mmdet3d_quant.engines.plugins.attributes import Field, named, read_attributes


@dataclass(frozen=True)
class Kind:
    """An operator.

    Attributes:
        run: Computes the outputs from attributes and inputs, float32 and int64.
        inputs: A letter for each: f for numbers, i for indices.
        outputs: The letters of the outputs; numbers have the type of the first input of numbers.
        fields: What its attributes may be.
        least: How many inputs it needs; None for all.
        check: Raises if attributes and the number of inputs do not fit.
    """

    run: Callable[[dict[str, Any], list[np.ndarray]], tuple[np.ndarray, ...]]
    inputs: str
    outputs: str
    fields: Mapping[str, Field]
    least: int | None = None
    check: Callable[[dict[str, Any], int], None] | None = None


class Operator:
    """A node with its attributes.

    Args:
        kind: Its operator.
        node: The node.

    Attributes:
        inputs: Names of the tensors that it reads.
        outputs: Names of those that it makes, '' for one that nobody wants.

    Raises:
        EngineError: If the node is not as its contract says; names it.
    """

    def __init__(self, kind: Kind, node: NodeProto) -> None:
        self.kind = kind
        self.name = named(node)
        self.inputs = list(node.input)
        self.outputs = list(node.output)
        while self.inputs and not self.inputs[-1]:
            self.inputs.pop()
        least = len(kind.inputs) if kind.least is None else kind.least
        if not least <= len(self.inputs) <= len(kind.inputs) or '' in self.inputs:
            raise EngineError(
                f'{self.name} has {len(self.inputs)} inputs, wanted are {least} to '
                f'{len(kind.inputs)}'
            )
        if len(self.outputs) > len(kind.outputs):
            raise EngineError(f'{self.name} has {len(self.outputs)} outputs')
        self.attributes = read_attributes(node, kind.fields)
        if kind.check:
            try:
                kind.check(self.attributes, len(self.inputs))
            except EngineError as err:
                raise EngineError(f'{self.name}: {err}') from None

    def types(self, inputs: Sequence[np.dtype]) -> list[np.dtype]:
        """Tells the types of the outputs.

        Raises:
            EngineError: If inputs have types that the operator does not take; names the node.
        """
        for name, letter, dtype in zip(self.inputs, self.kind.inputs, inputs):
            if dtype.kind != letter:
                raise EngineError(
                    f'{self.name} reads {name!r}, of type {dtype}; wanted are '
                    f'{"real numbers" if letter == "f" else "integers"}'
                )
        numbers = [dtype for dtype in inputs if dtype.kind == 'f']
        return [numbers[0] if letter == 'f' else np.dtype(np.int32) for letter in self.kind.outputs]

    def __call__(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the node, in float32.

        Args:
            arrays: Its inputs.

        Returns:
            Its outputs by name.

        Raises:
            EngineError: If the inputs do not fit; names the node.
        """
        types = self.types([array.dtype for array in arrays])
        wide = {'f': np.float32, 'i': np.int64}
        values = [
            np.asarray(array, wide[letter]) for array, letter in zip(arrays, self.kind.inputs)
        ]
        try:
            made = self.kind.run(self.attributes, values)
        except (EngineError, ValueError, IndexError) as err:
            raise EngineError(f'{self.name}: {err}') from err
        pairs = list(strict_zip(made, types))[: len(self.outputs)]
        return {n: np.asarray(a, t) for n, (a, t) in strict_zip(self.outputs, pairs) if n}
