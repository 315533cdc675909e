"""Float layers to quantized ones in place: the module stays the one it was, its class changes."""

from __future__ import annotations

from typing import Any

from mmcv.cnn.bricks import wrappers
from torch import nn
from torch.nn.utils import parametrize

from mmdet3d_quant.core.macs import weighted
from mmdet3d_quant.layers import conv
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.linear import QuantLinear

#: Types of torch, and what each becomes.
QUANTIZED: dict[type, type] = {
    nn.Conv1d: conv.QuantConv1d,
    nn.Conv2d: conv.QuantConv2d,
    nn.Conv3d: conv.QuantConv3d,
    nn.ConvTranspose1d: conv.QuantConvTranspose1d,
    nn.ConvTranspose2d: conv.QuantConvTranspose2d,
    nn.ConvTranspose3d: conv.QuantConvTranspose3d,
    nn.Linear: QuantLinear,
}
#: Subclasses that compute what their parent does: mmcv's differ for empty inputs on torch 1.4.
QUANTIZED.update({
    wrappers.Conv2d: conv.QuantConv2d,
    wrappers.Conv3d: conv.QuantConv3d,
    wrappers.ConvTranspose2d: conv.QuantConvTranspose2d,
    wrappers.ConvTranspose3d: conv.QuantConvTranspose3d,
    wrappers.Linear: QuantLinear,
})  # fmt: skip
#: Why other types stay float, by the name of the class or of one that it derives from.
WHY_FLOAT = {
    'SparseConvolution': 'sparse convolutions have types of their own: QuantSparseEncoder',
    'DeformConv2d': 'a deformable convolution samples its input between pixels, which no engine '
    'does in INT8',
    'ModulatedDeformConv2d': 'a deformable convolution samples its input between pixels, which no '
    'engine does in INT8',
    'Conv2dAdaptivePadding': 'it pads its input by a forward of its own, which a quantized '
    'convolution would leave out',
    'ConvWS2d': 'it standardises its weight in every forward',
    'ConvAWS2d': 'it standardises its weight in every forward',
    'NonDynamicallyQuantizableLinear': 'attention reads its weight without calling it',
}
#: Layers inside such ones that they call as any other, by name, and whose they are.
CALLED_INSIDE = {'conv_offset': ('DeformConv2d', 'ModulatedDeformConv2d')}


def swap_layers(model: nn.Module) -> dict[str, str]:
    """Makes every layer of a model a quantized one where its function stays the same.

    Exact types count: a subclass may compute something else. Parameters, hooks and references to
    a layer stay as they are.

    Args:
        model: Any module; changed in place.

    Returns:
        Dict from the name of each layer that stays float to the reason.
    """
    left: dict[str, str] = {}
    layers = weighted(model)
    for name, layer in layers.items():
        if isinstance(layer, QuantLayer):
            continue
        reason = _inside(name, left, layers) or why_float(layer)
        if reason is None:
            _swap(layer)
        else:
            left[name] = reason
    return left


def why_float(layer: Any) -> str | None:
    """Tells why a layer cannot become a quantized one; None if it can."""
    kind = type(layer)
    own = f'{kind.__name__} has a forward of its own'
    if parametrize.is_parametrized(layer) or 'weight' not in layer._parameters:
        return 'its weight is computed (a parametrization or a norm of the weight)'
    if 'forward' in vars(layer) or '_conv_forward' in vars(layer):
        return 'another forward was put in'
    if kind in QUANTIZED:
        return None
    return next((WHY_FLOAT[c.__name__] for c in kind.__mro__ if c.__name__ in WHY_FLOAT), own)


def _inside(name: str, left: dict[str, str], layers: dict[str, nn.Module]) -> str | None:
    """The reason of the layer that a layer is a part of, if both stay float."""
    owner, _, own = name.rpartition('.')
    kinds = {c.__name__ for c in type(layers.get(owner)).__mro__}
    if kinds.intersection(CALLED_INSIDE.get(own, ())):
        return None
    return next((why for other, why in left.items() if name.startswith(f'{other}.')), None)


def _swap(layer: Any) -> None:
    layer.__class__ = QUANTIZED[type(layer)]
    layer.add_quantizers()
    for quantizer in (layer._input_quantizer, layer._weight_quantizer):
        quantizer.to(layer.weight.device).train(layer.training)
