"""SmoothQuant: outliers of a linear layer's input go into its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from mmdet3d_quant.calibration.observe import Forward
from mmdet3d_quant.improve.channels import ALPHAS, Scaled, layers_of, scale_channels


def smooth_linears(
    model: nn.Module,
    batches: Iterable[Any],
    patterns: Sequence[str] = ('*',),
    alpha: float | None = 0.5,
    forward: Forward | None = None,
) -> Scaled:
    """Moves outliers of linear layers' inputs into their weights; the float model stays as it is.

    Input channel j is divided by ``max|X_j| ** alpha / max|W_j| ** (1 - alpha)`` (Xiao et al.,
    2023) and its weights are multiplied by it, over all layers that read the tensor together, as
    query, key and value. The factor goes into the LayerNorm before, or into the linear layer, if
    nothing but ReLU and moves of tokens are between. It is rounded to a power of two, with which
    float stays the same to the bit, up to one common power. A layer that would lose by it stays.

    Call it before :func:`mmdet3d_quant.calibrate`: where something is changed, all ranges that the
    model has are dropped.

    Args:
        model: A model with quantized layers, float weights loaded; its weights are changed in
            place.
        batches: A few batches, as ``calibrate`` takes them. Of several processes the first one's
            decide.
        patterns: Names of quantized linear layers, see :func:`mmdet3d_quant.core.spec.select`.
        alpha: How much goes to the weights, of 0 to 1; None: for each tensor what loses least.
        forward: As ``calibrate`` takes it.

    Returns:
        :class:`Scaled`, what was changed and what could not be.

    Raises:
        ValueError: If a pattern names no linear layer, there are no batches, or alpha is not in
            [0, 1].
        QuantError: If a layer computes something else afterwards; the model is as before then.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f'alpha must be in [0, 1], or None to search it, got {alpha}')
    names = layers_of(model, patterns, nn.Linear)
    alphas = ALPHAS if alpha is None else (alpha,)
    return scale_channels(model, batches, names, (nn.LayerNorm, nn.Linear), alphas, forward)
