"""Where tensors meet: all of them on one grid, so that an engine joins integers."""

from __future__ import annotations

from typing import Sequence

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmdet3d_quant.core.joined import mark
from mmdet3d_quant.core.quantizer import Quantizer


@MODELS.register_module()
class QuantConcat(nn.Module):
    """``torch.cat`` of inputs quantized with one scale.

    Args:
        dim: Dimension along which to concatenate.
    """

    def __init__(self, dim: int = 1):
        super().__init__()
        self.dim = dim
        self._input_quantizer = Quantizer(label=f'inputs of QuantConcat(dim={dim})')

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenates any number of tensors, quantized alike."""
        y = torch.cat([self._input_quantizer(t) for t in tensors], self.dim)
        alike = len({t.dtype for t in tensors}) == 1  # or some are rounded to another type, too
        if alike:
            mark(y, self._input_quantizer)
        return y

    def extra_repr(self) -> str:
        return f'dim={self.dim}'


@MODELS.register_module()
class QuantAdd(nn.Module):
    """Sum of two tensors quantized with one scale."""

    def __init__(self) -> None:
        super().__init__()
        self._input_quantizer = Quantizer(label='inputs of QuantAdd')

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """``a + b``, quantized alike; of one shape, any floating type."""
        return self._input_quantizer(a) + self._input_quantizer(b)
