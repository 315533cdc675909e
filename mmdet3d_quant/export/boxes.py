"""How the outputs of ``head.bbox`` code boxes: their names, and the way there and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

#: Tensors, or arrays of numpy, by name.
Values = Mapping[str, Any]


@dataclass(frozen=True)
class BoxCoding:
    """What an engine's runtime expects of the head.

    The head itself predicts by query ``score`` (B, classes, P), ``center`` (B, 2, P), ``height``
    (B, 1, P), ``dim`` (B, 3, P), ``rot`` (B, 2, P) and optionally ``vel`` (B, 2, P); its box coder
    says in which units.

    Attributes:
        outputs: Names of the outputs in the order of the file, last axis P each.
        velocity: Those of them that a head without velocity does not have.
        encode: From the head's predictions to the outputs; of tensors, and traced.
        decode: From the outputs back to the head's predictions; of tensors and of arrays.
    """

    outputs: tuple[str, ...]
    velocity: tuple[str, ...]
    encode: Callable[[Values], dict[str, Any]]
    decode: Callable[[Values], dict[str, Any]]

    def names(self, velocity: bool) -> tuple[str, ...]:
        """Lists the outputs of a head with velocity or without, in the order of the file."""
        return tuple(n for n in self.outputs if velocity or n not in self.velocity)

    def codes(self, names: Collection[str]) -> bool:
        """Whether outputs of these names are of this coding."""
        return set(self.names(velocity=False)) <= set(names)

    def places(self, outputs: Values) -> np.ndarray:
        """Computes what tells the queries of one sample apart, whatever their order.

        Args:
            outputs: Arrays (1, ..., P) by name.

        Returns:
            (P, 2 + classes): the centre, and 1000 for the class.
        """
        found = self.decode(outputs)
        return np.concatenate([found['center'][0].T, 1e3 * (found['score'][0] > 0).T], axis=1)


def _rename(values: Values, names: Mapping[str, str]) -> dict[str, Any]:
    return {new: values[old] for old, new in names.items() if old in values}


#: The head's predictions by the names that CUDA-BEVFusion has for them.
_RENAMED = dict(score='score', rot='rot', dim='dim', center='reg', height='height', vel='vel')
CUDA_BEVFUSION = BoxCoding(
    outputs=('score', 'rot', 'dim', 'reg', 'height', 'vel'),
    velocity=('vel',),
    encode=partial(_rename, names=_RENAMED),
    decode=partial(_rename, names={new: old for old, new in _RENAMED.items()}),
)
