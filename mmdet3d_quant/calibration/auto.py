"""The method ``auto``: the candidate range with the least error of the layer's output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, List, Tuple

import torch
from torch import Tensor, nn

from mmdet3d_quant.calibration.gather import gather_batches
from mmdet3d_quant.calibration.observe import Forward, run
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.fake_quant import fake_quantize
from mmdet3d_quant.core.modes import evaluating, quantizers, set_mode
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.features import values, with_values

#: Names of the quantizers of a unit, and its candidate ranges.
Candidates = List[Tuple[Tuple[str, ...], List[float]]]


def least_output_error(
    model: nn.Module,
    candidates: Candidates,
    batches: Iterable[tuple[int, Any]],
    forward: Forward | None = None,
) -> list[int]:
    """Chooses the candidate range with the least output error on held-out batches, per unit.

    The model runs in float; every layer computes its output again for each candidate range of its
    input, with quantized weights. The error is the squared difference to the float output,
    divided by the square of that; it is added up over the quantizers of a unit. Where a quantizer
    stands before a join (an add, a concat), the join's error is that of its input.

    Args:
        model: The model, its weight quantizers with a range.
        candidates: Per unit the names of its quantizers and the ranges to try.
        batches: Numbered batches that the ranges were not chosen from.
        forward: See :func:`mmdet3d_quant.calibrate`.

    Returns:
        List of int, the index of the best range of each unit, the first of equals. It does not
        depend on the number of processes: errors are kept by batch and added up in order.

    Raises:
        ValueError: If there are no batches, in all processes together.
    """
    ranges = {name: values for names, values in candidates for name in names}
    by_batch: dict[int, dict[str, list[float]]] = {}
    with set_mode(model, 'float'), evaluating(model), torch.no_grad():
        for number, batch in batches:
            with _errors(model, ranges) as errors:
                (forward or run)(model, batch)
            by_batch[number] = {n: e.tolist() for n, e in errors.items()}
    merged = gather_batches(by_batch, 'the method auto needs')
    return [_best(names, len(values), merged) for names, values in candidates]


def _best(names: tuple[str, ...], count: int, by_batch: dict[int, dict[str, list[float]]]) -> int:
    """Index of the candidate with the least relative error, summed over a unit's quantizers."""
    totals = [0.0] * count
    for name in names:
        rows = [found[name] for found in by_batch.values() if name in found]
        *errors, power = map(math.fsum, strict_zip(*rows)) if rows else [0.0] * (count + 1)
        if power > 0:
            totals = [t + e / power for t, e in strict_zip(totals, errors)]
    return min(range(count), key=totals.__getitem__)


@contextmanager
def _errors(model: nn.Module, ranges: dict[str, list[float]]) -> Iterator[dict[str, Tensor]]:
    """Hooks a model to measure the squared error of every candidate range.

    Yields:
        Dict of float64 tensors (candidates + 1,) by quantizer, filled while the model runs: sums of
        squared errors, and last of the squared output.
    """
    errors: dict[str, Tensor] = {}
    by_name = quantizers(model)
    inputs = {
        m._input_quantizer: (m, m._weight_quantizer)
        for m in model.modules()
        if isinstance(m, QuantLayer)
    }

    def note(name: str, exact: Tensor, tried: Iterable[Tensor]) -> None:
        sums = [(y.double() - exact.double()).square().sum() for y in tried]
        row = torch.stack([*sums, exact.double().square().sum()])
        errors[name] = errors[name] + row if name in errors else row

    def of_layer(name: str, layer: Any, weight: Quantizer) -> Any:
        quantizer, busy = by_name[name], False

        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            nonlocal busy
            if busy:
                return
            busy = True
            try:
                exact = values(output)
                note(name, exact, (trial(args, amax) for amax in ranges[name]))
            finally:
                busy = False

        def trial(args: tuple, amax: float) -> Tensor:
            x = values(args[0])
            limit = torch.tensor(amax, device=x.device)
            with _quantized(weight):
                tried = with_values(args[0], fake_quantize(x, limit, quantizer.spec))
                return values(layer(tried, *args[1:]))

        return layer.register_forward_hook(hook)

    def of_join(name: str) -> Any:
        quantizer = by_name[name]

        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            x = args[0]
            limits = (torch.tensor(amax, device=x.device) for amax in ranges[name])
            note(name, x, (fake_quantize(x, limit, quantizer.spec) for limit in limits))

        return quantizer.register_forward_hook(hook)

    handles = []
    try:
        for name in ranges:
            owner = inputs.get(by_name[name])
            handles.append(of_join(name) if owner is None else of_layer(name, *owner))
        yield errors
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quantized(quantizer: Quantizer) -> Iterator[None]:
    """Puts a quantizer into mode ``quant`` for a while, unless it is kept float."""
    before = quantizer.switches
    if quantizer.float_reason is None:
        quantizer.mode = 'quant'
    try:
        yield
    finally:
        quantizer.switches = before
