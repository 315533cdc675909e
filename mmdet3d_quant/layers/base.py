"""Base of the layers with a quantized input and a quantized weight."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_quantization.nn.modules._utils import QuantMixin
from torch import Tensor, nn

from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.fake_quant import compiling, largest
from mmdet3d_quant.core.grouped import rounded_together
from mmdet3d_quant.core.joined import untouched
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.core.spec import WEIGHT_METHODS, QuantSpec
from mmdet3d_quant.core.switches import DESCRIPTORS

#: The smallest range of a weight that is tried, in percent of its largest value.
_LEAST_PERCENT = 20


class QuantLayer(QuantMixin):
    """Adds the two quantizers, with pytorch-quantization's names, to a torch layer.

    Attributes:
        weight_axis: Axis of the weight that indexes output channels; one range per index.
        _input_quantizer: Per tensor.
        _weight_quantizer: Per output channel; ``_amax`` keeps the dimensions of the weight.
        why_integers: Why a layer of this type has no other number formats; empty if it has.
    """

    weight_axis = 0
    why_integers = ''
    weight: Tensor

    def add_quantizers(self) -> None:
        """Creates the quantizers; to be called once the weight exists."""
        shape = tuple(self.weight.shape)
        kind = f'{type(self).__name__} with weight {shape}'
        self._input_quantizer = Quantizer(label=f'input of {kind}')
        self._weight_quantizer = Quantizer(
            QuantSpec(axis=self.weight_axis),
            channels=shape[self.weight_axis],
            ndim=len(shape),
            label=f'weight of {kind}',
        )

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """Quantizes the weight; on a GPU all weights of a model that is trained together.

        Args:
            weight: The weight.

        Returns:
            Tensor of its shape; under autocast it may have the type that the layer computes in.
        """
        quantizer = self._weight_quantizer
        rounded = None if compiling() else rounded_together(quantizer, weight)
        return quantizer(weight) if rounded is None else rounded

    @classmethod
    def set_default_quant_desc_input(cls, value: Any) -> None:
        """Refuses, and says how bits and method are chosen.

        Raises:
            QuantError: Always.
        """
        raise QuantError(f'{cls.__name__}: {DESCRIPTORS}')

    set_default_quant_desc_weight = set_default_quant_desc_input

    def weight_amax(self, method: str = 'max') -> Tensor:
        """Computes the range of the weight of each output channel.

        Args:
            method: ``'max'``, the largest absolute weight, or ``'mse'``, the share of it, in
                steps of 1 %, with the least squared error.

        Returns:
            float32 of the shape of ``_weight_quantizer._amax``.

        Raises:
            ValueError: If the method is unknown.
        """
        if method not in WEIGHT_METHODS:
            raise ValueError(
                f'unknown method {method!r} for weights: expected {" or ".join(WEIGHT_METHODS)}'
            )
        limit = self.largest(self.weight)
        if method == 'max':
            return limit
        fmt = self._weight_quantizer.spec.format
        weight = self.weight.detach().float()
        dims = [d for d in range(weight.dim()) if d != self.weight_axis]
        best = torch.full_like(limit, float('inf'))
        chosen = limit.clone()
        for percent in range(100, _LEAST_PERCENT - 1, -1):
            amax = limit * (percent / 100)
            step = fmt.step(amax)
            error = fmt.round_(weight / step).mul_(step).sub_(weight)
            error = error.square().sum(dims, keepdim=True)
            chosen = torch.where(error < best, amax, chosen)
            best = torch.minimum(error, best)
        return chosen

    def largest(self, weight: Tensor) -> Tensor:
        """Computes the largest absolute value of each output channel of a weight of this shape.

        Returns:
            float32 of the shape of ``_weight_quantizer._amax``.
        """
        dims = [d for d in range(weight.dim()) if d != self.weight_axis]
        return largest(weight.detach().float(), dims)


def input_quantizer(module: nn.Module) -> list[Quantizer]:
    """Finds the quantizer through which a module reads its input.

    Args:
        module: A quantized layer or a quantizer; any other module has none.

    Returns:
        A list with it, or an empty one.
    """
    quantizer = module._input_quantizer if isinstance(module, QuantLayer) else module
    return [quantizer] if isinstance(quantizer, Quantizer) else []


def readers_of(*modules: nn.Module) -> list[Quantizer]:
    """Finds the quantizers of all that read a tensor, for :mod:`mmdet3d_quant.core.joined`.

    Args:
        modules: Everything that reads it: quantized layers, or quantizers.

    Returns:
        Their quantizers; none if one of the modules has none or is not untouched.
    """
    found = [q for module in modules if untouched(module) for q in input_quantizer(module)]
    return found if len(found) == len(modules) else []
