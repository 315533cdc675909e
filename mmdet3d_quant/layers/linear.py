"""Quantized linear layer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmdet3d_quant.layers.base import QuantLayer


@MODELS.register_module()
class QuantLinear(nn.Linear, QuantLayer):
    """``nn.Linear`` with quantized input (per tensor) and weight (per output feature).

    Takes the arguments of ``nn.Linear``. In float mode it equals it bit for bit.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_quantizers()

    def forward(self, input: Tensor) -> Tensor:
        """``input @ weight.T + bias``, both quantized; input has shape (..., in_features)."""
        return F.linear(self._input_quantizer(input), self.rounded_weight(self.weight), self.bias)
