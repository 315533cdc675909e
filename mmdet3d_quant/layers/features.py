"""The values of a tensor, dense or sparse, for code that serves both."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor


def values(x: Any) -> Tensor:
    """A tensor itself, or what a sparse tensor has at its active sites, (sites, channels)."""
    return x if isinstance(x, Tensor) else x.features


def with_values(x: Any, new: Tensor) -> Any:
    """The same sites with other values; ``x`` is not changed.

    Args:
        x: A tensor, or a ``SparseConvTensor`` of spconv 2 or mmcv.
        new: Values of the shape that :func:`values` has, or with another number of channels.
    """
    if isinstance(x, Tensor):
        return new
    if hasattr(x, 'replace_feature'):  # spconv 2, whose features cannot be assigned
        return x.replace_feature(new)
    other = copy.copy(x)
    other.features = new
    return other
