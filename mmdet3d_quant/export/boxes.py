"""How the outputs of ``head.bbox`` code boxes: their names, and the way there and back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Mapping

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
        name: What files call it in their metadata.
        text: What the numbers mean, for a reader who decodes them.
        outputs: Names of the outputs in the order of the file, last axis P each.
        velocity: Those of them that a head without velocity does not have.
        encode: From the head's predictions to the outputs; of tensors, and traced.
        decode: From the outputs back to the head's predictions; of tensors and of arrays.
    """

    name: str
    text: str
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
_NAMED_BACK = {new: old for old, new in _RENAMED.items()}


def _turn(values: Values, names: Mapping[str, str]) -> dict[str, Any]:
    """Renames, and changes between mmdet3d's coding and CUDA-BEVFusion's; its own inverse.

    CUDA-BEVFusion's yaw is ``-yaw - pi / 2`` of mmdet3d's, whose sine and cosine are ``rot``.
    """
    turned = _rename(values, names)
    if 'dim' in turned:
        turned['dim'] = turned['dim'][:, [1, 0, 2]]
    if 'rot' in turned:
        turned['rot'] = -turned['rot'][:, [1, 0]]
    return turned


_OUTPUTS = ('score', 'rot', 'dim', 'reg', 'height', 'vel')
MMDET3D = BoxCoding(
    name='mmdet3d',
    text='dim is the logarithm of length, width, height; rot is sine, cosine of the yaw, '
    'counterclockwise from x to the length',
    outputs=_OUTPUTS,
    velocity=('vel',),
    encode=partial(_rename, names=_RENAMED),
    decode=partial(_rename, names=_NAMED_BACK),
)
CUDA_BEVFUSION = BoxCoding(
    name='cuda-bevfusion',
    text='dim is the logarithm of width, length, height; rot is sine, cosine of -yaw - pi / 2, '
    'as mit-han-lab trained and CUDA-BEVFusion decodes',
    outputs=_OUTPUTS,
    velocity=('vel',),
    encode=partial(_turn, names=_RENAMED),
    decode=partial(_turn, names=_NAMED_BACK),
)
CODINGS = {coding.name: coding for coding in (MMDET3D, CUDA_BEVFUSION)}
#: Key of a coding's name in a file's ``metadata_props``; files without it are of MMDET3D.
BOXES_KEY = 'mmdet3d_quant.boxes'
