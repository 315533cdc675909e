"""Layers with weights, and how many multiply-accumulates each computes."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
#: Base class of the sparse convolutions of spconv and of mmcv.
_SPARSE = 'SparseConvolution'


def weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Finds the layers with weights, by name: linear layers and convolutions of all kinds."""
    return {name: module for name, module in model.named_modules() if _has_weights(module)}


def _has_weights(module: nn.Module) -> bool:
    if isinstance(module, _DENSE) or _SPARSE in (c.__name__ for c in type(module).__mro__):
        return True
    weight = module._parameters.get('weight')  # deformable convolutions and other own ones
    return weight is not None and weight.dim() > 2 and not isinstance(module, nn.LayerNorm)


class counting(AbstractContextManager):  # noqa: N801 - reads as a function
    """Counts the multiply-accumulates of every layer while the context is entered.

    A transposed convolution counts every product, those of the border that padding cuts off too. A
    sparse one counts the pairs of voxels that meet, on a CPU; on a GPU it is not counted. Bias and
    all that is no layer (attention, batch norm, activations) is not counted.

    Args:
        model: Any module; no forward hooks are left on it.

    Attributes:
        macs: Multiply-accumulates by name of the layer, of those that were run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.macs: dict[str, int] = {}
        self._layers = weighted(model)
        self._handles: list[Any] = []

    def __enter__(self) -> counting:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def count(module: Any, inputs: tuple, output: Any) -> None:
            macs = _macs(module, inputs, output)
            if macs is not None:
                self.macs[name] = self.macs.get(name, 0) + macs

        return count


def _macs(layer: Any, inputs: tuple, output: Any) -> int | None:
    """Multiply-accumulates of one call of a layer, None if they are not known."""
    if not isinstance(output, Tensor):  # sparse
        pairs = layer.num_pairs(output) if hasattr(layer, 'num_pairs') else None
        return None if pairs is None else pairs * layer.in_channels * layer.out_channels
    per_value = math.prod(layer.weight.shape[1:])
    if not isinstance(layer, _TRANSPOSED):
        return output.numel() * per_value
    return inputs[0].numel() * per_value if inputs else None
