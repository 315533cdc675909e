"""What every comparison starts from: a cut run in torch, and the SQNR of two arrays."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.decibels import decibels
from mmdet3d_quant.core.modes import set_mode
from mmdet3d_quant.engines import Arrays
from mmdet3d_quant.export.cuts import Cut


def sqnr(reference: np.ndarray | Tensor, value: np.ndarray | Tensor) -> float:
    """Computes ``10 log10(sum(reference**2) / sum((reference - value)**2))``.

    Args:
        reference: The signal, any shape.
        value: The signal with noise, same shape.

    Returns:
        Float, dB: infinity for equal arrays, -infinity for a zero signal, NaN if ``value`` is not
        finite.
    """
    ref, val = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    return decibels(float(np.sum(ref**2)), float(np.sum((ref - val) ** 2)))


@torch.no_grad()
def run_torch(cut: Cut, mode: str) -> Arrays:
    """Runs a cut in a mode of its quantizers; returns its outputs by name."""
    with set_mode(cut.module, mode):
        outputs = cut.module(*cut.inputs.values())
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return {n: o.cpu().numpy() for n, o in strict_zip(cut.output_names, outputs)}
