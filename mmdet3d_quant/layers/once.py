"""Rounding a tensor once for several readers that would round it alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mmdet3d_quant.quantizer import Quantizer

#: By the first reader: the ranges that were compared, by place and version, and whether they are
#: equal. On a GPU comparing waits for it, so it is done once for every change.
_compared: WeakKeyDictionary[Quantizer, tuple[list[tuple[int, int]], bool]] = WeakKeyDictionary()


@contextmanager
def rounded_once(x: Tensor, readers: Sequence[Quantizer]) -> Iterator[Tensor]:
    """Lets tied quantizers that read one tensor share the work: the same values and gradients.

    Used as ``with rounded_once(x, readers) as x:`` round the code that calls the readers with
    ``x``. Where they might differ (another range or mode, or a learned range, each of which needs
    a gradient), and in a trace, which shall show every one of them, they round by themselves. Not
    for code that is compiled: there the ``with`` would break the graph.

    Args:
        x: What all of them, and nothing else within the block, read.
        readers: With less than two there is nothing to share.

    Yields:
        ``x``, rounded if all would round it alike.
    """
    if not _alike(readers):
        yield x
        return
    x = readers[0](x)
    for reader in readers:
        reader.done = True
    try:
        yield x
    finally:
        for reader in readers:
            reader.done = False


def _alike(readers: Sequence[Quantizer]) -> bool:
    if len(readers) < 2 or torch.jit.is_tracing():
        return False
    first = readers[0]
    if not all(isinstance(q, Quantizer) for q in readers):  # the library's own, put in by hand
        return False
    if any(q.mode != 'quant' or not q.calibrated or q.learned for q in readers):
        return False
    if any(q.spec != first.spec for q in readers):
        return False
    versions = [(q._amax.data_ptr(), q._amax._version) for q in readers]
    known, equal = _compared.get(first, ([], False))
    if known != versions:
        equal = all(torch.equal(q._amax, first._amax) for q in readers)
        _compared[first] = versions, equal
    return equal
