"""Folding batch norm into the convolution before it, quantizer included."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.layers.pairs import TRANSPOSED, Run, find_pairs, output_axis
from mmdet3d_quant.layers.sparse import adds_bias


def fold_bn(model: nn.Module, run: Run | None = None) -> nn.Module:
    """Folds every BN that follows a convolution into it, in place; the BN becomes an identity.

    With ``f = gamma / sqrt(var + eps)``: ``weight * f``, ``bias * f + beta - mean * f``, and the
    weight range ``* |f|`` per output channel. Weight and range scale together, so the integers
    are the same (up to sign) and folding is exact for fake-quantized models too.

    A BN that cannot be folded stays, and the model computes the same; :func:`fold_known` tells
    the reasons.

    Args:
        model: Module in eval mode; changed in place.
        run: Runs ``model`` once on real inputs, such as ``lambda m: m(images)``: a BN follows a
            convolution when it alone reads what the convolution makes. Without, only children of
            modules that are known to call them in the order of registration are paired:
            ``nn.Sequential``, ``ConvModule``, the ResNet blocks and their sparse counterparts. A
            warning names the BN of other modules.

    Returns:
        ``model``.

    Raises:
        ValueError: If a BN is in training mode.
    """
    unsure = fold_known(model, run)[1]
    if unsure:
        warnings.warn(
            f'{len(unsure)} batch norm(s) not folded, {unsure[0]} first: only a forward shows what '
            'they read; pass run=lambda model: model(inputs)',
            stacklevel=2,
        )
    return model


def fold_known(
    model: nn.Module, run: Run | None = None, quantized: bool = True
) -> tuple[dict[str, str], list[str]]:
    """Folds as :func:`fold_bn` does, and tells what stays.

    Args:
        model: Module in eval mode; changed in place.
        run: See :func:`fold_bn`.
        quantized: False if weight ranges do not matter, as in a float graph; they are wrong then.

    Returns:
        Tuple of the reasons by name of the BN that stay, and the names of those that ``run``
        may find foldable.

    Raises:
        ValueError: If a BN is in training mode.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(f'cannot fold {name}: it is in training mode; call model.eval()')
    found = find_pairs(model, run, quantized)
    for conv, bn in found.folding:
        weight, bias, factor = _folded(conv, bn)
        conv.weight, conv.bias = weight, bias
        quantizer = getattr(conv, '_weight_quantizer', None)
        if quantizer is not None and quantizer.amax is not None:
            quantizer.amax = quantizer.amax * _range_factor(conv, factor)
        for parent, child in _places(model, bn):
            parent._modules[child] = nn.Identity()
        bn.register_forward_pre_hook(_refuse)
    return found.kept, found.unsure


class without_bn(AbstractContextManager):  # noqa: N801 - reads as a function
    """Folds the BN of a float model while the context is entered, which makes forwards faster.

    Folded weights are computed once, in ``__init__``; entering and leaving only swaps them in
    and out, and the parameters are the very same objects again afterwards. Weight ranges are not
    scaled, so the model must not quantize meanwhile. A BN that cannot be folded stays.

    Args:
        model: Module in eval mode.
        run: See :func:`fold_bn`.
    """

    def __init__(self, model: nn.Module, run: Run | None = None) -> None:
        self._convs: list[tuple[nn.Module, nn.Parameter, nn.Parameter]] = []
        self._norms: list[tuple[nn.Module, str, nn.Module | None]] = []
        self._folded: list[_BatchNorm] = []
        self._handles: list[Any] = []
        for conv, bn in find_pairs(model, run, quantized=False).folding:
            if adds_bias(conv):
                self._convs.append((conv, *_folded(conv, bn)[:2]))
                self._norms += [(parent, n, nn.Identity()) for parent, n in _places(model, bn)]
                self._folded.append(bn)

    def _swap(self) -> None:
        for i, (conv, weight, bias) in enumerate(self._convs):
            self._convs[i] = (conv, conv.weight, conv.bias)
            conv.weight, conv.bias = weight, bias
        for i, (parent, name, module) in enumerate(self._norms):
            self._norms[i] = (parent, name, parent._modules[name])
            parent._modules[name] = module

    def __enter__(self) -> None:
        self._swap()
        self._handles = [bn.register_forward_pre_hook(_refuse) for bn in self._folded]

    def __exit__(self, *exc_info: object) -> None:
        self._swap()
        for handle in self._handles:
            handle.remove()


def _places(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every parent of a module in a model, with its name there."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is module
    ]


def _refuse(bn: nn.Module, args: Any) -> None:
    """Forward hook of a BN that is folded, which some other reference than a child still calls."""
    raise QuantError(
        f'a {type(bn).__name__} of {bn.num_features} channels is folded into its convolution, but '
        'called through a list or another reference that is no child module: keep modules in an '
        'nn.ModuleList, or as attributes of one module only'
    )


@torch.no_grad()
def _folded(conv: nn.Module, bn: _BatchNorm) -> tuple[nn.Parameter, nn.Parameter, Tensor]:
    """Computes folded weight and bias, and the factor of each output channel."""
    assert bn.running_mean is not None and bn.running_var is not None
    factor = torch.rsqrt(bn.running_var + bn.eps)
    shift = -bn.running_mean * factor
    if bn.affine:
        factor, shift = factor * bn.weight, shift * bn.weight + bn.bias
    bias = shift if conv.bias is None else conv.bias * factor + shift
    trainable = conv.weight.requires_grad
    if isinstance(conv, TRANSPOSED) and conv.groups > 1:  # (in, out / groups, *kernel)
        parts = conv.weight.unflatten(0, (conv.groups, -1))
        per_group = factor.reshape(conv.groups, 1, -1, *[1] * (parts.dim() - 3))
        weight = (parts * per_group).flatten(0, 1)
    else:
        weight = conv.weight * _along(factor, output_axis(conv), conv.weight.dim())
    return nn.Parameter(weight, trainable), nn.Parameter(bias, trainable), factor


def _range_factor(conv: nn.Module, factor: Tensor) -> Tensor:
    """Factors of the ranges of a weight, shaped to broadcast with them."""
    if isinstance(conv, TRANSPOSED):
        factor = factor[: len(factor) // conv.groups]
    return _along(factor.abs(), output_axis(conv), conv.weight.dim())


def _along(values: Tensor, axis: int, ndim: int) -> Tensor:
    """Reshapes a vector to broadcast along one axis of an ``ndim``-dimensional tensor."""
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)])
