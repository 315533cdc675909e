"""Access to the values of dense and sparse tensors alike."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor


def values(x: Any) -> Tensor:
    """Returns a dense tensor itself, or the features (sites, channels) of a sparse one."""
    return x if isinstance(x, Tensor) else x.features


def with_values(x: Any, new: Tensor) -> Any:
    """Replaces the values of a tensor; ``x`` is not changed.

    Args:
        x: A tensor, or a ``SparseConvTensor`` of spconv 2 or mmcv.
        new: Values of the shape that :func:`values` has, or with another number of channels.

    Returns:
        ``new``, or a sparse tensor with the sites of ``x`` and these features.
    """
    if isinstance(x, Tensor):
        return new
    if hasattr(x, 'replace_feature'):  # spconv 2, whose features cannot be assigned
        return x.replace_feature(new)
    other = copy.copy(x)
    other.features = new
    return other
