"""Folding batch norm into the convolution before it, quantizer included."""

from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)


def fold_bn(model: nn.Module) -> nn.Module:
    """Folds every BN that follows a convolution into it, in place; the BN becomes an identity.

    With ``f = gamma / sqrt(var + eps)``: ``weight * f``, ``bias * f + beta - mean * f``, and the
    weight range ``* |f|`` per output channel. Weight and range scale together, so the integers
    are the same (up to sign) and folding is exact for fake-quantized models too.

    A BN follows a convolution when it is the next child registered in the same parent and has
    as many channels, which holds for ``ConvModule``, ``nn.Sequential`` and the ResNet blocks.

    Args:
        model: Module in eval mode; changed in place.

    Returns:
        ``model``.

    Raises:
        ValueError: If a BN to fold is in training mode or keeps no running statistics, or if
            the convolution is transposed with groups, where ranges are shared across groups.
    """
    for parent_name, parent in list(model.named_modules()):
        for conv, bn_name, bn in _pairs(parent):
            where = f'{parent_name}.{bn_name}'.lstrip('.')
            if bn.training or bn.running_mean is None:
                raise ValueError(f'cannot fold {where}: it is in training mode; call model.eval()')
            if isinstance(conv, _TRANSPOSED) and conv.groups > 1:
                raise ValueError(f'cannot fold {where} into a transposed convolution with groups')
            _fold(conv, bn)
            parent._modules[bn_name] = nn.Identity()
    return model


def _pairs(parent: nn.Module) -> Iterator[tuple[nn.Module, str, _BatchNorm]]:
    last: nn.Module | None = None
    for name, child in parent.named_children():
        if isinstance(child, _BatchNorm) and last is not None:
            if child.num_features == _out_channels(last):
                yield last, name, child
        if not isinstance(child, nn.Identity):
            last = child if isinstance(child, _CONVS) else None


def _out_channels(conv: nn.Module) -> int:
    return conv.out_features if isinstance(conv, nn.Linear) else conv.out_channels


@torch.no_grad()
def _fold(conv: nn.Module, bn: _BatchNorm) -> None:
    assert bn.running_mean is not None and bn.running_var is not None
    factor = torch.rsqrt(bn.running_var + bn.eps)
    shift = -bn.running_mean * factor
    if bn.affine:
        factor, shift = factor * bn.weight, shift * bn.weight + bn.bias
    axis = 1 if isinstance(conv, _TRANSPOSED) else 0
    per_channel = _along(factor, axis, conv.weight.dim())
    conv.weight = nn.Parameter(conv.weight * per_channel, conv.weight.requires_grad)
    bias = shift if conv.bias is None else conv.bias * factor + shift
    conv.bias = nn.Parameter(bias, conv.weight.requires_grad)
    quantizer = getattr(conv, '_weight_quantizer', None)
    if quantizer is not None and quantizer.amax is not None:
        quantizer.amax = quantizer.amax * per_channel.abs()


def _along(values: Tensor, axis: int, ndim: int) -> Tensor:
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)])
