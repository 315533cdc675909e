"""What the notes of a checkpoint say of steps that changed its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.improve.moves import AnyMove, ChannelMove, Move
from mmdet3d_quant.improve.readers import Reader

#: Keys of ``meta`` with moves of factors, in the order in which they were made: in float the model
#: computes the same, with other sizes in between.
MOVES = ('equalized', 'layers_equalized', 'smoothed')
#: Keys of steps by which the float model computes something else.
MOVED = ('norms_reestimated', 'rounding_learned', 'bias_corrected')


def recorded_moves(meta: Mapping[str, Any], model: nn.Module) -> list[AnyMove]:
    """Reads the moves of factors that a checkpoint tells.

    Args:
        meta: Of the checkpoint.
        model: The model that they are to fit.

    Returns:
        The moves, in order.

    Raises:
        QuantError: If a note is none, or names a layer that the model lacks.
    """
    layers = {name for name, m in model.named_modules() if getattr(m, 'weight', None) is not None}
    found = []
    for key in MOVES:
        for note in meta.get(key) or ():
            try:
                move = _move(note)
            except (KeyError, TypeError, ValueError) as err:
                raise QuantError(f'meta[{key!r}] of the checkpoint has no move: {note!r}') from err
            for name in (move.source, *(reader.layer for reader in move.readers)):
                if name not in layers:
                    raise QuantError(
                        f'meta[{key!r}] of the checkpoint moves factors of {name!r}, which the '
                        'model lacks: is it of another config?'
                    )
            found.append(move)
    return found


def _move(note: Any) -> AnyMove:
    readers = tuple(_reader(reader) for reader in note['readers'])
    if 'factors' in note:
        powers = tuple(_power(factor) for factor in note['factors'])
        return ChannelMove(str(note['source']), readers, powers, 0.0)
    concat, branch = str(note['concat']), int(note['branch'])
    return Move(concat, branch, str(note['source']), readers, _power(note['factor']))


def _reader(note: Any) -> Reader:
    if note['channels'] is None:
        return Reader(str(note['layer']), None, False)
    first, last = (int(place) for place in note['channels'])
    return Reader(str(note['layer']), (first, last), True)


def _power(factor: float) -> int:
    """The power of two that a factor is.

    Raises:
        ValueError: If it is none.
    """
    mantissa, exponent = math.frexp(factor)
    if mantissa != 0.5:
        raise ValueError(f'{factor} is no power of two')
    return exponent - 1
