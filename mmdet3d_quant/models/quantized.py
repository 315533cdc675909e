"""Settings of quantization for a model, or a part of one, whose type is a float one."""

from __future__ import annotations

from typing import Any

from mmdet3d.registry import MODELS
from torch import nn

from mmdet3d_quant.models.base import Formats, Skip, finish


@MODELS.register_module()
def Quantized(  # noqa: N802 - reads as the types beside it
    of: Any,
    skip: Skip = (),
    learn_amax: bool = False,
    format: Formats = (),
    **kwargs: Any,
) -> nn.Module:
    """Builds a model of another type, and gives it the settings that Quant types take.

    For a whole detector, or a float type that got quantized layers by ``conv_cfg``. What is built
    is the model itself: names, keys of checkpoints and its class are those that it has without.

    Args:
        of: Type of the model, as ``type`` would be.
        skip: Layers to keep float: name patterns, or ``{pattern: reason}``, relative to the model.
            Layers of a float type may be named, too: they are then meant to be float.
        learn_amax: Let training learn the ranges of activations.
        format: Number format, ``'int8'`` (the default) or ``'fp8'``, for all or by name pattern.
        **kwargs: Arguments of the model.

    Returns:
        The model.

    Raises:
        KeyError: If the type is unknown.
        ValueError: If a pattern of ``skip`` matches nothing.
    """
    model = MODELS.build(dict(kwargs, type=of))
    finish(model, skip, learn_amax, format)
    return model
