"""Folding batch norm into the convolution before it, quantizer included."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet3d_quant.layers.sparse import OUTPUTS_LAST, SPARSE_CONVS, adds_bias

_DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)
_CONVS = (*_DENSE, *SPARSE_CONVS)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)


def fold_bn(model: nn.Module) -> nn.Module:
    """Folds every BN that follows a convolution into it, in place; the BN becomes an identity.

    With ``f = gamma / sqrt(var + eps)``: ``weight * f``, ``bias * f + beta - mean * f``, and the
    weight range ``* |f|`` per output channel. Weight and range scale together, so the integers
    are the same (up to sign) and folding is exact for fake-quantized models too.

    A BN follows a convolution when it is the next child registered in the same parent and has
    as many channels, which holds for ``ConvModule``, ``nn.Sequential`` and the ResNet blocks, and
    for their sparse counterparts.

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
            problem = _problem(conv, bn)
            if problem:
                raise ValueError(f'cannot fold {where}: {problem}')
            weight, bias, factor = _folded(conv, bn)
            conv.weight, conv.bias = weight, bias
            quantizer = getattr(conv, '_weight_quantizer', None)
            if quantizer is not None and quantizer.amax is not None:
                quantizer.amax = quantizer.amax * factor.abs()
            parent._modules[bn_name] = nn.Identity()
    return model


class without_bn(AbstractContextManager):  # noqa: N801 - reads as a function
    """Folds the BN of a float model while the context is entered, which makes forwards faster.

    Folded weights are computed once, in ``__init__``; entering and leaving only swaps them in
    and out, and the parameters are the very same objects again afterwards. Weight ranges are not
    scaled, so the model must not quantize meanwhile. A BN that cannot be folded stays.

    Args:
        model: Module in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._convs: list[tuple[nn.Module, nn.Parameter, nn.Parameter]] = []
        self._norms: list[tuple[nn.Module, str, nn.Module | None]] = []
        for parent in model.modules():
            for conv, name, bn in _pairs(parent):
                if _problem(conv, bn) is None and adds_bias(conv):
                    self._convs.append((conv, *_folded(conv, bn)[:2]))
                    self._norms.append((parent, name, nn.Identity()))

    def _swap(self) -> None:
        for i, (conv, weight, bias) in enumerate(self._convs):
            self._convs[i] = (conv, conv.weight, conv.bias)
            conv.weight, conv.bias = weight, bias
        for i, (parent, name, module) in enumerate(self._norms):
            self._norms[i] = (parent, name, parent._modules[name])
            parent._modules[name] = module

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *exc_info: object) -> None:
        self._swap()


def _pairs(parent: nn.Module) -> Iterator[tuple[nn.Module, str, _BatchNorm]]:
    """Yields each convolution with the name and module of the BN that follows it in a parent."""
    order = getattr(parent, 'order', ())  # ConvModule's
    if 'norm' in order and order.index('norm') < order.index('conv'):
        return
    last: nn.Module | None = None
    for name, child in parent.named_children():
        if isinstance(child, _BatchNorm) and last is not None:
            if child.num_features == _out_channels(last):
                yield last, name, child
        if not isinstance(child, nn.Identity):
            last = child if isinstance(child, _CONVS) else None


def _out_channels(conv: nn.Module) -> int:
    return conv.out_features if isinstance(conv, nn.Linear) else conv.out_channels


def _problem(conv: nn.Module, bn: _BatchNorm) -> str | None:
    """Reason why a pair cannot be folded; None if it can."""
    if bn.training or bn.running_mean is None:
        return 'it is in training mode; call model.eval()'
    if isinstance(conv, _TRANSPOSED) and conv.groups > 1:
        return 'it follows a transposed convolution with groups'
    return None


@torch.no_grad()
def _folded(conv: nn.Module, bn: _BatchNorm) -> tuple[nn.Parameter, nn.Parameter, Tensor]:
    """Computes folded weight and bias, and the weight's factor, shaped to broadcast with it."""
    assert bn.running_mean is not None and bn.running_var is not None
    factor = torch.rsqrt(bn.running_var + bn.eps)
    shift = -bn.running_mean * factor
    if bn.affine:
        factor, shift = factor * bn.weight, shift * bn.weight + bn.bias
    per_channel = _along(factor, _output_axis(conv), conv.weight.dim())
    bias = shift if conv.bias is None else conv.bias * factor + shift
    trainable = conv.weight.requires_grad
    weight = nn.Parameter(conv.weight * per_channel, trainable)
    return weight, nn.Parameter(bias, trainable), per_channel


def _output_axis(conv: nn.Module) -> int:
    """Axis of the weight that indexes output channels."""
    if isinstance(conv, OUTPUTS_LAST):
        return conv.weight.dim() - 1
    return 1 if isinstance(conv, _TRANSPOSED) else 0


def _along(values: Tensor, axis: int, ndim: int) -> Tensor:
    """Reshapes a vector to broadcast along one axis of an ``ndim``-dimensional tensor."""
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)])
