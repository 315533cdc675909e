"""Bias correction: the mean error of a layer's output, which rounding leaves, goes off its bias."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mmengine.dist import all_gather_object
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet3d_quant.calibration.gather import gather_batches
from mmdet3d_quant.calibration.observe import Forward, run
from mmdet3d_quant.calibration.result import Choice
from mmdet3d_quant.core.copies import deep_copy
from mmdet3d_quant.core.modes import evaluating, set_mode
from mmdet3d_quant.core.spec import select_all
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.features import values
from mmdet3d_quant.layers.pairs import find_pairs

#: Why a layer stays as it is.
NO_PLACE = 'it has no bias, and no batch norm that reads it alone'


class BiasCorrection:
    """Step after the ranges that makes the mean of each layer's output that of the float layer.

    Every layer computes its output twice on the float model's tensors: in float and quantized. The
    mean difference of each channel goes into the layer's bias, or where it has none into the
    running mean of the batch norm behind it. Ranges stay as they are. The float model moves by as
    much as the biases do.

    Args:
        patterns: Names of layers, see :func:`mmdet3d_quant.core.spec.select`.
        forward: See :func:`mmdet3d_quant.calibrate`.

    Attributes:
        corrected: By layer the largest change of a channel, in standard deviations of the layer's
            output over all channels.
        left: Reason by name of each layer that was not corrected.
    """

    def __init__(self, patterns: Sequence[str] = ('*',), forward: Forward | None = None) -> None:
        self.patterns, self.forward = list(patterns), forward or run
        self.corrected: dict[str, float] = {}
        self.left: dict[str, str] = {}

    def layers(self, model: nn.Module) -> dict[str, QuantLayer]:
        """Finds the quantized layers that the patterns name.

        Raises:
            ValueError: If a pattern names none.
        """
        known = {
            n: m
            for n, m in model.named_modules()
            if isinstance(m, QuantLayer) and m._weight_quantizer.float_reason is None
        }
        names = select_all(known, self.patterns, 'quantized layer', 'bias correction')
        return {name: known[name] for name in names}

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, choices: list[Choice], held_out: list[tuple[int, Any]]
    ) -> None:
        """Corrects a calibrated model in place; with several processes all alike.

        Args:
            model: Calibrated.
            choices: Not read.
            held_out: Numbered batches.

        Raises:
            ValueError: If a pattern names no layer, or there is no batch.
        """
        layers = self.layers(model)
        errors = output_errors(model, layers, held_out, self.forward)
        first = [] if not held_out else [held_out[0][1]]
        norms = self._norms(model, first)
        self.corrected = {}
        self.left = {n: 'no batch reached it' for n in layers if n not in errors}
        for name, (mean, deviation) in errors.items():
            layer = layers[name]
            bias, norm = getattr(layer, 'bias', None), norms.get(layer)
            if bias is not None:
                bias.data -= mean.to(bias)
            elif norm is not None and norm.running_mean is not None:
                norm.running_mean += mean.to(norm.running_mean)
            else:
                self.left[name] = NO_PLACE
                continue
            largest = float(mean.abs().max())
            self.corrected[name] = largest / deviation if deviation else 0.0

    def __str__(self) -> str:
        text = f'{len(self.corrected)} biases corrected'
        if self.corrected:
            worst = max(self.corrected, key=self.corrected.__getitem__)
            text += f', by up to {self.corrected[worst]:.2g} standard deviations ({worst})'
        reasons = ''.join(f'; {name} is left: {why}' for name, why in self.left.items())
        return text + reasons

    def _norms(self, model: nn.Module, batches: Sequence[Any]) -> dict[nn.Module, _BatchNorm]:
        """The batch norm that alone reads what a layer makes, by layer; the same in all processes.

        A process without a batch looks at the order of the modules, which is less; so the layers
        are those that every process has found.
        """
        names = {module: name for name, module in model.named_modules()}
        with evaluating(model):
            found = find_pairs(
                model,
                partial(self._run, deep_copy(batches[0])) if batches else None,
                quantized=False,
            ).folding
        pairs = {names[layer]: norm for layer, norm in found}
        shared = set.intersection(*(set(p) for p in all_gather_object(sorted(pairs))))
        modules = dict(model.named_modules())
        return {modules[name]: norm for name, norm in pairs.items() if name in shared}

    def _run(self, batch: Any, model: nn.Module) -> Any:
        return self.forward(model, batch)


def output_errors(
    model: nn.Module,
    layers: dict[str, QuantLayer],
    batches: Iterable[tuple[int, Any]],
    forward: Forward | None = None,
) -> dict[str, tuple[Tensor, float]]:
    """Measures the mean error of layers' outputs, on the float model's tensors.

    Args:
        model: A calibrated model.
        layers: By name.
        batches: Numbered; of several processes each has its own.
        forward: See :func:`mmdet3d_quant.calibrate`.

    Returns:
        By name of a layer that was reached: float64 (channels,), the mean of the quantized output
        minus the float one; and the standard deviation of the float output.

    Raises:
        ValueError: If there are no batches, in all processes together.
    """
    by_batch: dict[int, dict[str, Tensor]] = {}
    with set_mode(model, 'float'), evaluating(model), torch.no_grad():
        for number, batch in batches:
            with _sums(layers) as sums:
                (forward or run)(model, deep_copy(batch))
            by_batch[number] = {name: row.cpu() for name, row in sums.items()}
    totals: dict[str, Tensor] = {}
    for sums in gather_batches(by_batch, 'bias correction needs').values():
        for name, row in sums.items():
            totals[name] = totals[name] + row if name in totals else row
    found = {}
    for name in (n for n in layers if n in totals):
        error, output, square, count = totals[name]
        mean = output.sum() / count.sum()
        variance = (square.sum() / count.sum() - mean**2).clamp(min=0)
        found[name] = (error / count, float(variance.sqrt()))
    return found


@contextmanager
def _sums(layers: dict[str, QuantLayer]) -> Iterator[dict[str, Tensor]]:
    """Hooks layers to add up error, output, squared output and count; (4, channels) by name."""
    sums: dict[str, Tensor] = {}
    busy = False

    def hook_of(name: str) -> Any:
        def hook(layer: Any, args: Any, output: Any) -> None:
            nonlocal busy
            if busy:
                return
            busy = True
            try:
                with set_mode(layer, 'quant'):
                    rounded = values(layer(*args))
            finally:
                busy = False
            exact = values(output).double()
            last = isinstance(layer, nn.Linear) or exact.dim() == 2
            axis = exact.dim() - 1 if last else 1
            dims = [d for d in range(exact.dim()) if d != axis]
            error = (rounded.double() - exact).sum(dims)
            count = torch.full_like(error, exact.numel() / exact.shape[axis])
            row = torch.stack([error, exact.sum(dims), exact.square().sum(dims), count])
            sums[name] = sums[name] + row if name in sums else row

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]  # type: ignore[attr-defined]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
