"""Cross-layer equalization: channels of one size, so that all of them fill the grid they share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet3d_quant.calibration.observe import Forward
from mmdet3d_quant.improve.channels import Scaled, layers_of, scale_channels
from mmdet3d_quant.layers.pairs import CONVS

#: Layers that take a factor per output channel.
SOURCES = (*CONVS, _BatchNorm, nn.GroupNorm)


def equalize_layers(
    model: nn.Module,
    batches: Iterable[Any],
    patterns: Sequence[str] = ('*',),
    forward: Forward | None = None,
) -> Scaled:
    """Scales the input channels of layers alike by powers of two; the float model stays as it is.

    A tensor has one scale, so a channel that is much smaller than another is left with few levels.
    A factor per channel goes into the batch norm, or the layer without one, that makes the tensor,
    and out of the weights that read it. Between them may be what commutes with a positive factor:
    ReLU, LeakyReLU and PReLU, pooling, resizing, concats. ReLU6 and others with a bend elsewhere do
    not, and the layer behind stays, as it does behind a sum. A depthwise convolution takes a
    factor without loss, as each of its channels has a range of its own.

    Of Nagel et al. (2019) this is the case of weights with a range per output channel: the ranges
    that are made alike are those of the activations, traded against those of the weights that read
    them. How far is what loses least in a sample of the batches, see
    :mod:`mmdet3d_quant.improve.channels`.

    Call it before :func:`mmdet3d_quant.calibrate`: where something is changed, all ranges that the
    model has are dropped.

    Args:
        model: A model with quantized layers, float weights loaded; its weights are changed in
            place.
        batches: A few batches, as ``calibrate`` takes them. Of several processes the first one's
            decide.
        patterns: Names of quantized layers whose inputs are scaled, see
            :func:`mmdet3d_quant.core.spec.select`.
        forward: As ``calibrate`` takes it.

    Returns:
        :class:`Scaled`, what was changed and what could not be.

    Raises:
        ValueError: If a pattern names no layer, or there are no batches.
        QuantError: If a layer computes something else afterwards; the model is as before then.
    """
    names = layers_of(model, patterns)
    return scale_channels(model, batches, names, SOURCES, forward=forward)
