"""The error of files that hold weights."""

from __future__ import annotations

from mmdet3d_quant.core.errors import QuantError


class CheckpointError(QuantError, ValueError):
    """A checkpoint is missing, damaged, unsafe to read or of another architecture."""
