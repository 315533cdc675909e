"""What all layers with a quantized input and a quantized weight share."""

from __future__ import annotations

from pytorch_quantization.nn.modules._utils import QuantMixin
from torch import Tensor

from mmdet3d_quant.quantizer import Quantizer
from mmdet3d_quant.spec import QuantSpec


class QuantLayer(QuantMixin):
    """Adds the two quantizers, with pytorch-quantization's names, to a torch layer.

    Attributes:
        weight_axis: Axis of the weight that indexes output channels; one range per index.
        _input_quantizer: Per tensor.
        _weight_quantizer: Per output channel; ``_amax`` keeps the dimensions of the weight.
    """

    weight_axis = 0
    weight: Tensor

    def add_quantizers(self) -> None:
        """Creates the quantizers; called once the weight exists."""
        shape = tuple(self.weight.shape)
        kind = f'{type(self).__name__} with weight {shape}'
        self._input_quantizer = Quantizer(label=f'input of {kind}')
        self._weight_quantizer = Quantizer(
            QuantSpec(axis=self.weight_axis),
            channels=shape[self.weight_axis],
            ndim=len(shape),
            label=f'weight of {kind}',
        )

    def weight_amax(self) -> Tensor:
        """Largest absolute weight of each output channel.

        Returns:
            float32 of the shape of ``_weight_quantizer._amax``.
        """
        dims = [d for d in range(self.weight.dim()) if d != self.weight_axis]
        return self.weight.detach().float().abs().amax(dims, keepdim=True)
