"""Comparison of exported graphs with their torch models by SQNR."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.decibels import decibels
from mmdet3d_quant.core.modes import set_mode
from mmdet3d_quant.engines import Arrays, ONNXRuntime, OpenVINO
from mmdet3d_quant.export.cuts import Cut
from mmdet3d_quant.export.targets import coding_of


@dataclass(frozen=True)
class Agreement:
    """Signal-to-quantization-noise ratios of one output, in dB.

    Attributes:
        cut: Name of the cut.
        output: Name of the output.
        fake_quant: Torch fake-quant against torch float: what quantization costs.
        onnxruntime: ONNX Runtime against the torch model that was exported.
        openvino: OpenVINO against the torch model that was exported.
        int8_convs: Convolutions that OpenVINO runs in INT8.
        all_convs: All convolutions of the graph in OpenVINO.
    """

    cut: str
    output: str
    fake_quant: float
    onnxruntime: float
    openvino: float
    int8_convs: int
    all_convs: int


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


def verify(cut: Cut, path: str | Path, quantized: bool = True) -> list[Agreement]:
    """Compares an exported file with its model on the example inputs.

    Args:
        cut: The cut, its module in eval mode on the CPU.
        path: The file exported from it.
        quantized: Whether the file has Q/DQ nodes.

    Returns:
        List of :class:`Agreement`, one per output.
    """
    expected = run_torch(cut, 'quant' if quantized else 'float')
    unquantized = run_torch(cut, 'float')
    arrays = {n: t.cpu().numpy() for n, t in cut.inputs.items()}
    reference, engine = ONNXRuntime(path)(arrays), OpenVINO(path)
    result, convs = engine(arrays), engine.int8_convolutions()
    reference, result = align(expected, reference), align(expected, result)
    return [
        Agreement(
            cut.name,
            name,
            sqnr(unquantized[name], expected[name]),
            sqnr(expected[name], reference[name]),
            sqnr(expected[name], result[name]),
            *convs,
        )
        for name in cut.output_names
    ]


def align(expected: Arrays, found: Arrays) -> Arrays:
    """Reorders the queries of a head to match another run.

    Queries are the highest peaks in falling order; where two are equal but for the last bit, two
    engines order them differently.

    Args:
        expected: Outputs of a cut, by name; of ``head.bbox`` (1, ..., P) each.
        found: The same of another run.

    Returns:
        Arrays by name: of a head, ``found`` with the query of most equal class and place for each
        one of ``expected``; of any other cut, ``found`` as it is.
    """
    coding = coding_of(expected)
    if coding is None:
        return found
    apart = np.abs(coding.places(expected)[:, None] - coding.places(found)[None]).sum(axis=2)
    order = apart.argmin(axis=1)
    return {name: value[..., order] for name, value in found.items()}
