"""Signal-to-quantization-noise ratio (SQNR) in decibels."""

from __future__ import annotations

import math


def decibels(signal: float, noise: float) -> float:
    """Computes ``10 log10(signal / noise)``.

    Args:
        signal: Power of the signal, or its sum of squares.
        noise: The same of the error.

    Returns:
        float, dB: infinity without noise, -infinity for noise without a signal, NaN if the noise
        is not finite or the signal is NaN.

    Example:
        >>> decibels(100.0, 1.0), decibels(1.0, 0.0), decibels(0.0, 1.0)
        (20.0, inf, -inf)
    """
    if math.isnan(signal) or not math.isfinite(noise):
        return math.nan
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio else -math.inf
